"""Which image and which cluster a command line means, CEPH_ARGS included."""

from __future__ import annotations

from typing import NamedTuple

import click
import pytest

from rbdnbd.errors import UsageError
from rbdnbd.options import cluster_options, image_options
from rbdnbd.spec import ClusterOptions, ImageSpec


class Seen(NamedTuple):
    spec: ImageSpec
    cluster: ClusterOptions


@click.command()
@image_options()
@cluster_options
def command(spec: ImageSpec, cluster: ClusterOptions) -> Seen:
    return Seen(spec, cluster)


@pytest.fixture(autouse=True)
def no_ceph_args(monkeypatch):
    monkeypatch.delenv("CEPH_ARGS", raising=False)


def parse(*words: str) -> Seen:
    return command.main(list(words), standalone_mode=False)


def cluster(*words: str) -> ClusterOptions:
    return parse("rbd/vol", *words).cluster


def spec(*words: str) -> str:
    return str(parse(*words).spec)


def refusal(*words: str) -> str:
    with pytest.raises(UsageError) as refused:
        parse(*words)
    return refused.value.message


def test_nothing_given_is_client_admin_and_cephs_own_configuration():
    assert cluster() == ClusterOptions(name="client.admin")


@pytest.mark.parametrize(
    ("words", "options"),
    [
        (["-c", "/c"], ClusterOptions(conf="/c")),
        (["--conf", "/c"], ClusterOptions(conf="/c")),
        (["--cluster", "backup"], ClusterOptions(cluster="backup")),
        (["--id", "joe"], ClusterOptions(name="client.joe")),
        (["-i", "joe"], ClusterOptions(name="client.joe")),
        (["-n", "client.joe"], ClusterOptions(name="client.joe")),
        (["--name", "mgr.x"], ClusterOptions(name="mgr.x")),
        (["--keyring", "/k"], ClusterOptions(keyring="/k")),
        (["--keyfile", "/k"], ClusterOptions(keyfile="/k")),
        (["-m", "192.0.2.1,192.0.2.2"], ClusterOptions(mon_host="192.0.2.1,192.0.2.2")),
        (["--mon-host", "192.0.2.1"], ClusterOptions(mon_host="192.0.2.1")),
    ],
)
def test_cephs_options_are_understood(words, options):
    assert cluster(*words) == options


def test_id_and_name_together_are_refused():
    assert refusal("rbd/vol", "--id", "joe", "--name", "client.joe") == (
        "use either --id or --name, not both"
    )


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("--id joe", ClusterOptions(name="client.joe")),
        ("--id=joe", ClusterOptions(name="client.joe")),
        ("-i joe", ClusterOptions(name="client.joe")),
        ("-n client.joe", ClusterOptions(name="client.joe")),
        ("--name=client.joe", ClusterOptions(name="client.joe")),
        ("-c '/etc/my ceph.conf'", ClusterOptions(conf="/etc/my ceph.conf")),
        ("--cluster backup", ClusterOptions(cluster="backup")),
        ("", ClusterOptions()),
    ],
)
def test_ceph_args_tell_what_librados_must_know_first(monkeypatch, text, options):
    monkeypatch.setenv("CEPH_ARGS", text)
    assert cluster() == options


def test_what_else_ceph_args_have_is_left_to_librados(monkeypatch):
    monkeypatch.setenv(
        "CEPH_ARGS", "-m 192.0.2.1 --debug-rbd=20 --keyring /k --id joe --rbd_cache false --no-mon"
    )
    assert cluster() == ClusterOptions(name="client.joe")


def test_an_option_of_ceph_that_begins_like_one_of_ours_is_not_taken_for_it(monkeypatch):
    monkeypatch.setenv("CEPH_ARGS", "--clus x --nam y --con z")
    assert cluster() == ClusterOptions()


@pytest.mark.parametrize(
    ("words", "options"),
    [
        (["--id", "ann"], ClusterOptions(conf="/c", cluster="backup", name="client.ann")),
        (["--name", "client.ann"], ClusterOptions(conf="/c", cluster="backup", name="client.ann")),
        (["-c", "/d"], ClusterOptions(conf="/d", cluster="backup", name="client.joe")),
        (["--cluster", "b"], ClusterOptions(conf="/c", cluster="b", name="client.joe")),
    ],
)
def test_the_command_line_is_stronger_than_ceph_args(monkeypatch, words, options):
    monkeypatch.setenv("CEPH_ARGS", "--id joe -c /c --cluster backup")
    assert cluster(*words) == options


@pytest.mark.parametrize("text", ["--id", "-c '/etc"])
def test_ceph_args_that_cannot_be_read_are_refused_by_name(monkeypatch, text):
    monkeypatch.setenv("CEPH_ARGS", text)
    assert refusal("rbd/vol").startswith("CEPH_ARGS: ")


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["rbd/ns/vol@s"], "rbd/ns/vol@s"),
        (["vol", "--pool", "rbd"], "rbd/vol"),
        (["vol", "-p", "rbd", "--namespace", "ns", "--snap", "s"], "rbd/ns/vol@s"),
        (["rbd/vol", "--namespace", "ns"], "rbd/ns/vol"),
        (["rbd/vol", "--pool", "rbd"], "rbd/vol"),
        (["rbd/ns/vol@s", "--namespace", "ns", "--snap", "s"], "rbd/ns/vol@s"),
        (["--image", "vol"], "vol"),
        (["--image", "vol", "--pool", "rbd", "--snap", "s"], "rbd/vol@s"),
        (["--image", "my vol", "--pool", "my pool"], "my pool/my vol"),
    ],
)
def test_spec_and_options_add_up_to_one_image(words, meant):
    assert spec(*words) == meant


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rbd/vol", "--pool", "ssd"], "rbd/vol and --pool ssd contradict each other"),
        (["a/b/c", "--namespace", "x"], "a/b/c and --namespace x contradict each other"),
        (["vol@a", "--snap", "b"], "vol@a and --snap b contradict each other"),
        (["--image", "rbd/vol", "-p", "ssd"], "rbd/vol and --pool ssd contradict each other"),
    ],
)
def test_a_spec_and_an_option_that_contradict_each_other_are_refused(words, message):
    assert refusal(*words) == message


@pytest.mark.parametrize("words", [[], ["rbd/vol", "--image", "vol"], ["", "--pool", "rbd"]])
def test_no_image_or_two_are_refused(words):
    assert refusal(*words) == "name one image: SPEC, or --image"


def test_a_malformed_spec_is_refused_whatever_the_options_say():
    assert refusal("rbd//vol", "--pool", "rbd").startswith("invalid spec 'rbd//vol'")


def test_image_takes_a_whole_spec_as_rbd_does():
    assert parse("--image", "rbd/vol@s").spec == ImageSpec("rbd", "", "vol", "s")
