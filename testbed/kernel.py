"""Debian's own kernel for a VM, unpacked beside the sources and never installed.

`apt-get download` fetches the package behind linux-image-amd64, `dpkg -x` unpacks it below
.build/kernel and depmod makes it modprobe's. A kernel that is there and complete is used again.
The initramfs is written here, a cpio archive in the "newc" format (Linux,
Documentation/driver-api/early-userspace/buffer-format.rst): a static busybox, an init script
and the few modules that stand between the kernel and the host's file system.
"""

from __future__ import annotations

import lzma
import os
import stat
import struct
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from testbed.processes import Unavailable

BUILD = Path(__file__).resolve().parent.parent / ".build" / "kernel"
META_PACKAGE = "linux-image-amd64"
BUSYBOX = Path("/bin/busybox")
# What the guest needs before it can see the host's root; modules.dep adds what these need.
BOOT_MODULES = (
    "virtio_pci",
    "virtio_console",
    "virtio_net",
    "9pnet_virtio",
    "9p",
    "overlay",
)


@dataclass(frozen=True, slots=True)
class Kernel:
    """An unpacked kernel package: `root` has boot/ and lib/modules/ in it."""

    root: Path

    @property
    def modules(self) -> Path:
        """The directory of its modules, named after its release."""
        return next((self.root / "lib" / "modules").iterdir())

    @property
    def release(self) -> str:
        """What `uname -r` says in it."""
        return self.modules.name

    @property
    def packed(self) -> Path:
        """The kernel image as the package brings it."""
        return self.root / "boot" / f"vmlinuz-{self.release}"

    @property
    def image(self) -> Path:
        """The kernel image that QEMU boots: the uncompressed one, where there is one."""
        unpacked = self.root / "boot" / f"vmlinux-{self.release}"
        return unpacked if unpacked.exists() else self.packed


def debian_kernel(build: Path = BUILD) -> Kernel:
    """Return Debian's kernel, fetched and unpacked below `build` when it is not there yet.

    Takes about ten seconds and 70 MB of download the first time, nothing later.
    """
    root = build / "root"
    if not root.exists():
        build.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="fetch-", dir=build) as scratch:
            _fetch(Path(scratch))
            _publish(Path(scratch) / "root", root)
    return Kernel(root)


def _fetch(scratch: Path) -> None:
    scratch.chmod(0o755)
    package = _real_package()
    _run(["apt-get", "download", "-o", "APT::Sandbox::User=root", package], scratch)
    (archive,) = scratch.glob("*.deb")
    root = scratch / "root"
    _run(["dpkg", "-x", str(archive), str(root)], scratch)
    if not (root / "lib").exists():
        (root / "lib").symlink_to("usr/lib")  # where newer packages keep the modules
    kernel = Kernel(root)
    _run(["depmod", "-b", str(root), kernel.release], scratch)
    if (elf := uncompressed(kernel.packed.read_bytes())) is not None:
        (root / "boot" / f"vmlinux-{kernel.release}").write_bytes(elf)


def uncompressed(image: bytes) -> bytes | None:
    """Return the ELF kernel inside a bzImage, or None when it is not packed with xz.

    An emulated processor unpacks for three seconds at every boot what takes this one half of one.
    The offsets are the boot protocol's (Linux, Documentation/arch/x86/boot.rst): setup_sects at
    0x1f1, payload_offset and payload_length at 0x248. QEMU starts the ELF file by its PVH note.
    """
    offset, length = struct.unpack_from("<II", image, 0x248)
    start = (image[0x1F1] + 1) * 512 + offset
    payload = image[start : start + length]
    if not payload.startswith(b"\xfd7zXZ\0"):
        return None
    return lzma.LZMADecompressor().decompress(payload)


def _publish(made: Path, root: Path) -> None:
    """Move the unpacked kernel in place; another process may have been there first."""
    try:
        os.rename(made, root)
    except OSError:
        if not root.exists():
            raise


def _real_package() -> str:
    listing = _run(["apt-cache", "depends", "--important", META_PACKAGE], Path("/"))
    for line in listing.splitlines():
        kind, _, name = line.strip().partition(": ")
        if kind == "Depends" and name.startswith("linux-image-"):
            return name
    raise Unavailable(f"apt knows no package {META_PACKAGE}: run apt-get update first")


def _run(argv: list[str], cwd: Path) -> str:
    try:
        done = subprocess.run(argv, cwd=cwd, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise Unavailable(f"{argv[0]} is not installed") from error
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise Unavailable(f"{' '.join(argv[:2])} failed: {said[-1]}")
    return done.stdout


def module_files(kernel: Kernel, names: Iterable[str]) -> list[Path]:
    """Return the files of the modules and of all they depend on, in an order that loads.

    Modules that are built into the kernel are left out.
    """
    depends: dict[str, list[str]] = {}
    for line in (kernel.modules / "modules.dep").read_text().splitlines():
        path, _, needed = line.partition(":")
        depends[path] = needed.split()
    by_name = {Path(path).name.split(".")[0].replace("-", "_"): path for path in depends}
    order: dict[str, None] = {}
    for name in names:
        if name in by_name:
            # modules.dep names the nearest dependency first: the last one is loaded first.
            for path in (*reversed(depends[by_name[name]]), by_name[name]):
                order.setdefault(path)
    return [kernel.modules / path for path in order]


def initramfs(kernel: Kernel, files: Mapping[str, bytes]) -> bytes:
    """Return an initramfs with `files` (name to content, all executable), busybox and modules.

    The modules are /modules/NN-NAME.ko, to be loaded in the order of their names.
    """
    if not BUSYBOX.exists():
        raise Unavailable(f"{BUSYBOX} is missing: install busybox-static")
    content = {"bin/busybox": BUSYBOX.read_bytes(), **files}
    for number, path in enumerate(module_files(kernel, BOOT_MODULES)):
        data = path.read_bytes()
        if path.suffix == ".xz":
            data = lzma.decompress(data)
        content[f"modules/{number:02}-{path.name.split('.')[0]}.ko"] = data
    archive = bytearray()
    for directory in ("bin", "modules", "proc", "sys", "dev", "mnt"):
        archive += _entry(directory, stat.S_IFDIR | 0o755, b"")
    for name, data in content.items():
        archive += _entry(name, stat.S_IFREG | 0o755, data)
    return bytes(archive + _entry("TRAILER!!!", 0, b""))


def _entry(name: str, mode: int, data: bytes) -> bytes:
    """One cpio entry: thirteen numbers of eight hex digits, the name, the data, padded to 4."""
    path = name.encode() + b"\0"
    # inode, mode, uid, gid, links, mtime, size, four device numbers, name's size, checksum
    numbers = (0, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(path), 0)
    header = b"070701" + b"".join(b"%08x" % number for number in numbers) + path
    return header + bytes(-len(header) % 4) + data + bytes(-len(data) % 4)
