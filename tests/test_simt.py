"""The execution model proves itself: planted faults are caught and named, their corrected twins run clean."""

import re

import numpy as np
import pytest
import simt_build as simt


@pytest.fixture(scope="module")
def planted():
    return simt.load("planted")


def floats(n):
    return np.arange(1, n + 1, dtype=np.float32)


def blank(n):
    return np.zeros(n, np.float32)


def targets(n, seed=0):
    keep = np.random.default_rng(seed).random(n) < 0.6
    return np.where(keep, np.cumsum(keep) - 1, -1).astype(np.int32)


def run(module, name, fault, options):
    """Runs one planted kernel; returns its report, what it computed and what it should have."""
    x, y = floats(200 if name == "neighbours" else 256), blank(256)
    if name in ("reverse", "reverse_warp"):
        return getattr(module, name)(options, fault, x, y), y, x.reshape(-1, 64 if name == "reverse" else 32)[:, ::-1].ravel()
    if name == "neighbours":
        return module.neighbours(options, fault, x, y := y[:200].copy()), y, x + np.append(x[1:], 0)
    if name == "accumulate":
        return module.accumulate(options, fault, x, y), y, x
    if name == "compact":
        target = targets(len(x := floats(1000)))
        kept = np.flatnonzero(target >= 0)
        return module.compact(options, fault, x, target), x[: len(kept)], floats(1000)[kept]
    if name == "sum":
        return module.sum(options, fault, x, y := blank(1)), y, [x.sum()]
    if name == "meet":
        return module.meet(options, fault, y := blank(64)), y, np.ones(64)
    return module.wait(options, fault), 0, 0


# kernel, fault (0 is the corrected twin), kind, where, under which schedules at least
FAULTS = [
    ("reverse", 1, "data race", r"tile\+\d+", simt.SCHEDULES),  # a missing __syncthreads
    ("reverse", 1, "uninitialised read", r"tile\+\d+", simt.SCHEDULES),
    ("reverse_warp", 1, "data race", r"dynamic shared memory\+\d+", simt.SCHEDULES),  # a missing __syncwarp
    ("neighbours", 1, "out of bounds", r"x\+800", simt.SCHEDULES),
    ("neighbours", 2, "out of bounds", r"y\+800", simt.SCHEDULES),
    ("neighbours", 3, "out of bounds", r"guarded\+256", simt.SCHEDULES),
    ("accumulate", 1, "uninitialised read", r"y\+\d+", simt.SCHEDULES),
    ("compact", 1, "data race", r"x\+\d+", simt.SCHEDULES),  # no wait for the tile that is overwritten
    ("compact", 2, "data race", r"x\+\d+", simt.SCHEDULES),  # the flag is raised, but releases nothing
    ("compact", 3, "deadlock", r"loaded\+\d+", ("reverse", "random", "ahead", "behind")),  # waits for a block to come
    ("sum", 1, "data race", r"partial\+\d+", simt.SCHEDULES),  # a lost fence
    ("sum", 2, "data race", r"partial\+\d+", simt.SCHEDULES),  # a fence for the block alone
    ("sum", 3, "data race", r"partial\+\d+", simt.SCHEDULES),  # a reader without a fence
    ("meet", 1, "divergent barrier", "", simt.SCHEDULES),
    ("meet", 2, "divergent barrier", "", simt.SCHEDULES),
    ("wait", 1, "time-out", "", ("reverse",)),  # looks at the flag once, and spins
]


@pytest.mark.parametrize("schedule", simt.SCHEDULES)
@pytest.mark.parametrize("name, fault, kind, where, schedules", FAULTS, ids=[f"{f[0]}-{f[1]}-{f[2]}" for f in FAULTS])
def test_planted_fault_is_caught_and_its_twin_is_clean(planted, name, fault, kind, where, schedules, schedule):
    for seed in range(3):
        options = {"schedule": schedule, "seed": seed, "timeout": 0.3 if name == "wait" else 20}
        report, got, expected = run(planted, name, 0, options)
        simt.assert_clean(planted, report)
        np.testing.assert_array_equal(got, expected)
        if schedule in schedules:
            found = [f for f in run(planted, name, fault, options)[0]["faults"] if f["kind"] == kind]
            assert found, f"{kind} went unseen with seed {seed}"
            assert found[0]["kernel"] == name
            assert re.fullmatch(where, found[0]["address"])


def test_report_names_kernel_block_thread_address_and_source_line(planted):
    report, _, _ = run(planted, "reverse", 1, {"schedule": "ascending"})
    race = next(f for f in report["faults"] if f["kind"] == "data race" and "reads" in f["message"])
    # In ascending order thread 32 is the first that reads what another thread has written: tile[31].
    assert (race["kernel"], race["block"], race["thread"], race["address"]) == ("reverse", (0, 0, 0), (32, 0, 0), "tile+124")
    assert race["message"] == "reads tile+124, not ordered after the write by block (0, 0, 0) thread (31, 0, 0)"
    source = (simt.SIMT / "planted.cpp").read_text().splitlines()
    line = next(i for i, text in enumerate(source, 1) if "y[i] = tile[63 - t];" in text)
    assert f"planted.cpp:{line}" in simt.explain(planted, report)


def test_deadlock_names_the_flag_and_the_blocks_that_never_came(planted):
    report, _, _ = run(planted, "compact", 3, {"schedule": "reverse", "resident_blocks": 2})
    (fault,) = report["faults"]
    assert fault["kind"] == "deadlock" and fault["block"] in [(14, 0, 0), (15, 0, 0)]
    assert re.search(r"14 blocks have not started", fault["message"])


@pytest.mark.parametrize("resident", [1, 2, 16, 64])
def test_compaction_is_right_whatever_is_resident(planted, resident):
    for seed in range(10):
        x, target = floats(1000), targets(1000, seed)
        report = planted.compact({"seed": seed, "resident_blocks": resident}, 0, x, target)
        simt.assert_clean(planted, report)
        np.testing.assert_array_equal(x[: target.max() + 1], floats(1000)[target >= 0])


def test_output_left_unwritten_is_a_fault(planted):
    (fault,) = planted.neighbours({}, 0, floats(100), blank(128))["faults"]
    assert fault["kind"] == "uninitialised read" and "the host reads y+400" in fault["message"]


@pytest.mark.parametrize("stride, conflicts", [(1, 0), (2, 1), (4, 3), (32, 31), (33, 0)])
def test_bank_conflicts(planted, stride, conflicts):
    report = planted.banks({}, stride, blank(32))
    simt.assert_clean(planted, report)
    assert report["kernels"]["banks"]["shared_requests"] == 2
    assert report["kernels"]["banks"]["bank_conflicts"] == 2 * conflicts  # one write, one read


@pytest.mark.parametrize(
    "stride, offset, size, sectors",
    [(1, 0, 128, 4), (1, 1, 128, 5), (1, 8, 128, 4), (2, 0, 128, 8), (8, 0, 128, 32), (0, 3, 4, 1)],
)
def test_sectors_of_a_warp_request(planted, stride, offset, size, sectors):
    x, y = floats(512), blank(32)
    for schedule in simt.SCHEDULES:
        report = planted.stride({"schedule": schedule}, stride, offset, x, y)
        simt.assert_clean(planted, report)
        np.testing.assert_array_equal(y, x[np.arange(32) * stride + offset])
        assert report["kernels"]["stride"]["loads"] == {"requests": 1, "bytes": size, "sectors": sectors}
        assert report["kernels"]["stride"]["stores"] == {"requests": 1, "bytes": 128, "sectors": 4}


def test_misaligned_buffer_costs_a_sector_and_forbids_wide_loads(planted):
    options = {"misalign": {"x": 4}}
    assert planted.stride(options, 1, 0, floats(32), blank(32))["kernels"]["stride"]["loads"]["sectors"] == 5
    (fault,) = planted.copy16(options, floats(128), blank(128))["faults"]
    assert (fault["kind"], fault["kernel"]) == ("misaligned", "copy16")


def test_wide_access_is_one_request(planted):
    x, y = floats(128), blank(128)
    report = planted.copy16({}, x, y)
    simt.assert_clean(planted, report)
    np.testing.assert_array_equal(x, y)
    assert report["kernels"]["copy16"]["loads"] == {"requests": 1, "bytes": 512, "sectors": 16}


def test_seed_reproduces_the_schedule(planted):
    for fault in (0, 1):
        reports = [run(planted, "compact", fault, {"seed": seed})[0] for seed in (1, 1, 2)]
        assert reports[0] == reports[1]
        assert reports[0]["trace"] != reports[2]["trace"]


@pytest.mark.parametrize("schedule", simt.SCHEDULES)
def test_warp_wide_intrinsics(planted, schedule):
    x, y = np.arange(32, dtype=np.int32) * 3, np.zeros((9, 32), np.int32)
    simt.assert_clean(planted, planted.intrinsics({"schedule": schedule}, x, y))
    lane = np.arange(32)
    np.testing.assert_array_equal(y[0], np.full(32, x[5]))
    np.testing.assert_array_equal(y[1], x[lane ^ 3])
    np.testing.assert_array_equal(y[2], x[np.where(lane % 8 < 6, lane + 2, lane)])
    np.testing.assert_array_equal(y[3], x[np.maximum(lane - 1, 0)])
    assert set(y[4]) == {np.packbits(x & 1, bitorder="little").view(np.int32)[0]}
    assert set(y[5]) == {2}
    bits = [int(v) for v in x[16:]]
    popc_ffs_clz = [v.bit_count() + (v & -v).bit_length() + 32 - v.bit_length() for v in bits]
    np.testing.assert_array_equal(y[6], [x[:16].sum()] * 16 + popc_ffs_clz)
    third = x.astype(np.float32) / 3
    np.testing.assert_array_equal(y[7] << 16, third.view(np.int32))  # small integers are exact in bfloat16
    np.testing.assert_array_equal(y[8], third.astype(np.float16).view(np.uint16))


def test_atomics(planted):
    for schedule in simt.SCHEDULES:
        y, f = np.zeros(4, np.int32), blank(1)
        simt.assert_clean(planted, report := planted.atomics({"schedule": schedule}, 10, y, f))
        assert y.tolist() == [640, 63, 1280, 0] and f[0] == 320
        assert report["kernels"]["atomics"]["atomics"]["bytes"] >= 4 * 4 * 20


def test_unknown_options_are_refused(planted):
    with pytest.raises(ValueError, match="no option 'sed'"):
        planted.wait({"sed": 1}, False)
    with pytest.raises(ValueError, match="no schedule 'sideways'"):
        planted.wait({"schedule": "sideways"}, False)
