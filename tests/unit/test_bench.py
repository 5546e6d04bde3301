"""The benchmark's arithmetic and tables; what it measures is no test's business."""

from __future__ import annotations

import argparse

import pytest

from bench.candidates import parsed
from bench.cells import CELLS, Cell, chosen
from bench.figures import Sample, geometric_mean, median, ratio, turns
from bench.fio import options, sample_of
from bench.parts import measure
from bench.report import BEGIN, END, between_marks
from bench.results import Results, provenance
from bench.table import figure_table, has, number, table
from bench.targets import EVENTS, Target, doubt, kernel_ratio, targets
from testbed.processes import Unavailable, silent


def sample(iops=100.0, p50_us=1.0, p99_us=1.0, cpu_us=10.0, rss_kib=0, threads=0):
    return Sample(iops, p50_us, p99_us, cpu_us, rss_kib, threads)


def candidate(*rates, cpu_us=10.0, p99_us=1.0, idle_kib=30 * 1024):
    cells = {
        "4k random read, 1": [sample(iops=rate, cpu_us=cpu_us, p99_us=p99_us) for rate in rates]
    }
    as_kept = {
        cell: [
            {"iops": s.iops, "p50_us": s.p50_us, "p99_us": s.p99_us, "cpu_us": s.cpu_us}
            for s in several
        ]
        for cell, several in cells.items()
    }
    return {"idle": {"rss_kib": idle_kib, "threads": 20}, "cells": as_kept}


def test_a_median_is_the_middle_round_s():
    assert median([sample(iops=1), sample(iops=100), sample(iops=2)], "iops") == 2


def test_a_ratio_compares_round_with_round_so_that_drift_cancels_out():
    ours = [sample(iops=rate) for rate in (50, 220, 200)]
    theirs = [sample(iops=rate) for rate in (100, 200, 400)]
    assert ratio(ours, theirs, "iops") == 0.5


def test_rounds_that_do_not_pair_up_are_refused():
    with pytest.raises(ValueError, match="argument 2"):
        ratio([sample()], [sample(), sample()], "iops")


def test_a_geometric_mean_of_a_half_and_a_double_is_one():
    assert geometric_mean([0.5, 2.0]) == pytest.approx(1.0)


@pytest.mark.parametrize("names", ["abc", "abcdef"])
def test_everybody_stands_in_every_place_as_often_as_everybody_else(names):
    orders = [turns(names, number) for number in range(2 * len(names))]
    for place in range(len(names)):
        assert sorted(order[place] for order in orders) == sorted(2 * names)


def test_over_two_rounds_nobody_comes_earlier_than_another():
    there, back = turns("abcd", 4), turns("abcd", 5)
    assert {there.index(name) + back.index(name) for name in "abcd"} == {3}


def test_a_table_lines_up():
    assert table(["x", "n"], [["long", "1"], ["y", "10,000"]]) == (
        "| x    |      n |\n| ---- | -----: |\n| long |      1 |\n| y    | 10,000 |"
    )


@pytest.mark.parametrize(
    ("value", "shown"), [(1234.6, "1,235"), (100.4, "100"), (99.94, "99.9"), (0.1234, "0.123")]
)
def test_a_number_shows_three_digits_that_matter(value, shown):
    assert number(value) == shown


def test_the_table_of_a_figure_has_the_stock_s_own_the_ratios_and_their_mean():
    native = {"rbd-nbd": candidate(100, 200), "rbdnbd": candidate(90, 180)}
    lines = figure_table(native, "iops").splitlines()
    assert lines[0].split(" | ")[1:] == ["rbd-nbd", "rbdnbd |"]
    assert [cell.strip() for cell in lines[2].strip("|").split("|")] == [
        *("4k random read, 1", "150", "0.90")
    ]
    assert lines[-1].replace(" ", "") == "|geometricmean||0.90|"


def test_who_has_no_server_has_no_column_for_its_processor_time():
    assert not has({"cell": [sample(cpu_us=0)]}, "cpu_us")
    native = {"rbd-nbd": candidate(100), "librbd alone": candidate(100, cpu_us=0.0)}
    assert "librbd alone" not in figure_table(native, "cpu_us")


@pytest.mark.parametrize(("measured", "at_least", "met"), [(0.9, True, True), (0.9, False, True)])
def test_a_target_that_is_just_reached_is_met(measured, at_least, met):
    assert Target("x", measured, 0.9, at_least).met is met


def test_a_target_on_the_wrong_side_is_not_met():
    assert not Target("x", 0.89, 0.9, at_least=True).met
    assert not Target("x", 0.91, 0.9, at_least=False).met


def by_what(found):
    return {target.what: target for target in found}


def test_the_worst_cell_is_held_against_the_engine_s_target():
    native = {"rbd-nbd": candidate(100), "rbdnbd events": candidate(96)}
    found = by_what(targets({"native": native}, "rbdnbd events"))
    worst = found["worst native cell (4k random read, 1)"]
    assert (worst.measured, worst.wanted, worst.met) == (0.96, EVENTS.cell, True)
    assert not found["geometric mean of the native cells"].met


def test_memory_of_an_idle_mapping_is_compared_by_difference():
    native = {"rbd-nbd": candidate(1), "rbdnbd": candidate(1, idle_kib=51 * 1024)}
    more = by_what(targets({"native": native}, "rbdnbd"))["more memory of an idle mapping, MiB"]
    assert (more.measured, more.met) == (21.0, False)


def test_the_stock_against_itself_says_how_much_to_doubt_a_ratio():
    worst, mean = doubt({"rbd-nbd": candidate(100, 100), "rbd-nbd again": candidate(90, 90)})
    assert (worst, mean) == (pytest.approx(0.1), pytest.approx(0.1))


def test_what_was_not_measured_has_no_target():
    assert targets({}, "rbdnbd") == []


def test_a_rate_through_the_kernel_is_compared_round_with_round():
    rates = {"rbd-nbd": {"mkfs.ext4": [1.0, 2.0, 4.0]}, "rbdnbd": {"mkfs.ext4": [2.0, 4.0, 8.0]}}
    assert kernel_ratio(rates, "rbdnbd", "mkfs.ext4") == 2.0


def test_the_last_tenth_of_a_million_is_compared_with_the_first():
    parts = [
        {"iops": 1.0, "p50_us": 1, "p99_us": 1, "cpu_us": cpu, "rss_kib": rss}
        for cpu, rss in ((10.0, 100), (99.0, 999), (11.0, 100))
    ]
    found = targets({"million": {"rbdnbd": parts}}, "rbdnbd")
    assert [(target.measured, target.met) for target in found] == [(1.1, False), (1.0, True)]


def test_the_figures_replace_what_stands_between_the_marks_and_nothing_else():
    page = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    assert between_marks(page, "new") == f"before\n{BEGIN}\n\nnew\n\n{END}\nafter\n"


def test_a_page_without_marks_is_not_written():
    with pytest.raises(ValueError, match="no place"):
        between_marks("page", "new")


def test_a_candidate_is_a_name_and_an_argv():
    found = parsed("mine=x map --device {device} '{image}'")
    assert (found.name, found.has_device) == ("mine", True)
    assert found.command(device="/dev/nbd0", image="a b") == [
        "x",
        "map",
        "--device",
        "/dev/nbd0",
        "a b",
    ]


@pytest.mark.parametrize(
    "text", ["x", "x=y", "=y {image} {device}", "x=y {image}", "x=y {image} {device} {socket}"]
)
def test_a_candidate_without_its_places_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="not a candidate"):
        parsed(text)


def test_cells_are_chosen_by_words_of_their_names():
    assert {cell.depth for cell in chosen("random read")} == {1, 32, 128}
    with pytest.raises(argparse.ArgumentTypeError, match="no cell"):
        chosen("nothing")


def test_every_cell_has_a_name_of_its_own_that_ends_with_its_depth():
    assert len({cell.name for cell in CELLS}) == len(CELLS)
    assert all(cell.name.endswith(f", {cell.depth}") for cell in CELLS)


def test_a_mix_in_fio_s_words():
    assert options(Cell("m", 4096, 32, 70)) == [
        *("--rw=randrw", "--rwmixread=70", "--bs=4096", "--iodepth=32")
    ]


def test_the_latency_of_a_flushed_write_in_fio_is_the_write_s_and_the_flush_s():
    way = {"total_ios": 1, "iops": 5.0}
    lat = {"percentile": {"50.000000": 1000, "99.000000": 2000}}
    job = {"write": way | {"lat_ns": lat}, "read": {"total_ios": 0}}
    job["sync"] = {"total_ios": 1, "lat_ns": {"percentile": {"50.000000": 500, "99.000000": 500}}}
    assert (sample_of(job).p50_us, sample_of(job).p99_us) == (1.5, 2.5)


def run(began="2026-01-01 12:00", processor="one"):
    how = {"rounds": 6, "seconds": 1.0, "kernel_rounds": 5}
    return {"began": began, "machine": {"processor": processor}} | how


def unavailable():
    raise Unavailable("the VM was lost")


def test_a_part_that_fails_does_not_lose_the_others(tmp_path):
    """Seen to fail with a part's Unavailable let through, and with all kept at the end."""
    path = tmp_path / "results.json"
    parts = {
        "a": lambda: 1,
        "b": unavailable,
        "c": lambda: 1 / 0,
        "d": lambda: Results(path).runs(),
    }
    failures = measure("abcd", parts, Results(path), run(), silent)
    assert failures.keys() == {"b", "c"}
    assert failures["b"] == "the VM was lost"
    assert Results(path).figures() == {"a": 1, "d": {"a": run()}}


def test_parts_that_are_measured_later_join_those_of_an_earlier_run(tmp_path):
    """Seen to fail with a file that only has the parts of the last run."""
    path = tmp_path / "results.json"
    measure("ab", {"a": lambda: 1, "b": lambda: 2}, Results(path), run(), silent)
    measure("b", {"b": lambda: 3}, Results(path), run("2026-01-02 12:00"), silent)
    assert Results(path).figures() == {"a": 1, "b": 3}
    assert {part: each["began"] for part, each in Results(path).runs().items()} == {
        "a": "2026-01-01 12:00",
        "b": "2026-01-02 12:00",
    }


@pytest.mark.parametrize(
    ("runs", "complete"),
    [
        ({"a": run()}, False),
        ({"a": run(), "b": run("2026-01-02 12:00")}, True),
        ({"a": run(), "b": run(processor="another")}, False),
    ],
)
def test_results_are_complete_with_all_parts_of_one_machine(tmp_path, runs, complete):
    """Seen to fail with machines that are not compared."""
    results = Results(tmp_path / "results.json")
    for part, each in runs.items():
        results.keep(part, each, 1)
    assert results.complete("ab") is complete


def test_a_file_that_holds_something_else_is_refused(tmp_path):
    path = tmp_path / "results.json"
    path.write_text('{"native": {}}')
    with pytest.raises(ValueError, match="no results of this version"):
        Results(path)


def test_the_page_says_if_parts_come_from_different_runs():
    """Seen to fail with the first part's run said of all."""
    assert provenance({"a": run(), "b": run()}) == (
        "Measured on: processor one. All in one run: 2026-01-01 12:00,"
        " 6 rounds of 1 s a cell, 5 rounds through the kernel."
    )
    text = provenance({"a": run(), "b": run("2026-01-02 12:00"), "c": run()})
    assert "different runs. a, c: 2026-01-01 12:00, 6 rounds" in text
    assert "kernel. b: 2026-01-02 12:00, 6 rounds" in text
