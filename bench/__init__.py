"""`make bench`: rbdnbd beside rbd-nbd, qemu-nbd and librbd alone, measured on one machine in turns."""
