"""`make bench`: rbdnbd beside rbd-nbd, qemu-nbd and librbd alone, in turns on one machine."""
