"""The commands that only look: what is mapped, what it has done, what udev is to call it."""

from __future__ import annotations

import click

from rbdnbd.devices import NbdDevices


@click.command("list-mapped")
@click.option("--format", "style", type=click.Choice(["plain", "json"]), default="plain")
def list_mapped(style: str) -> None:
    """List the mappings of this host."""
    from rbdnbd.listing import KEYS, listing
    from rbdnbd.mapped import mapped

    documents = mapped(NbdDevices())
    if style == "plain":
        click.echo(listing(documents, style, pretty=False), nl=False)
    else:
        import json

        keys = (*KEYS, "size", "read_only", "attached_by", "connections", "since")
        click.echo(json.dumps([{key: document[key] for key in keys} for document in documents]))


@click.command("stats")
@click.option("--format", "style", type=click.Choice(["plain", "json"]), default="plain")
def stats_command(style: str) -> None:
    """Show what every mapping has done, and what it is doing."""
    from rbdnbd.mapped import mapped
    from rbdnbd.report import statistics

    documents = mapped(NbdDevices())
    if style == "plain":
        click.echo(statistics(documents), nl=False)
    else:
        import json

        keys = ("device", "pool", "namespace", "image", "snap", "stats", "in_flight")
        click.echo(json.dumps([{key: document[key] for key in keys} for document in documents]))


@click.command("name")
@click.argument("device", metavar="/dev/nbdN")
def name_command(device: str) -> None:
    """Print what udev's rule calls a device, as properties; say nothing of a stranger's.

    RBDNBD_NAME is the image's name, RBDNBD_WAITING=1 stands for a device whose process is gone.
    Exits with 1, in silence, for a device that no image of ours is on.
    """
    from rbdnbd.names import properties

    devices = NbdDevices()
    found = properties(devices.index(device), devices)
    if found is None:
        raise SystemExit(1)
    for key, value in found.items():
        click.echo(f"{key}={value}")
