"""`python3 -m rbdnbd`: the same as the command rbdnbd."""

from rbdnbd.main import main

main()
