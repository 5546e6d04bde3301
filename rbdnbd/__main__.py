"""`python3 -m rbdnbd`: the same as the command rbdnbd."""

from rbdnbd.cli import main

main()
