"""compare.py, the benchmarks of asv and their scripts: small, and nothing is timed in earnest."""

import contextlib
import importlib
import inspect
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from reference import Naive, channel_statistic, statistic

FOLDER = Path(__file__).parents[1] / "asv_benchmarks"
OURS = {"cases", "compare", "plain", "report", "rounding", "benchmarks", "turns"}
MODULES = (
    "accuracy", "backward", "baselines", "exchange", "forward", "memory", "moments", "njit",
    "small", "startup",
)  # fmt: skip


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Import a script by its name; their cases.py is not the one of the tests."""
    before = dict(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NUMBANORM_BENCH_SMALL", "1")
        patch.setattr(sys, "path", [str(FOLDER), *sys.path])
        # Else they would take this for a commit that asv has installed.
        patch.delenv("ASV_COMMIT", raising=False)
        patch.delitem(sys.modules, "cases", raising=False)
        yield importlib.import_module
    for name in set(sys.modules) - set(before):
        if name.split(".")[0] in OURS:
            del sys.modules[name]
    if "cases" in before:
        sys.modules["cases"] = before["cases"]


@pytest.fixture(scope="module")
def cases(load):
    return load("cases")


@pytest.fixture(scope="module")
def compare(load, cases):
    return load("compare")


@pytest.fixture
def report(load):
    return load("report")


@pytest.fixture
def regression(load):
    return load("regression")


@pytest.fixture
def turns(load):
    return load("turns")


@pytest.fixture
def dashboard(load):
    return load("dashboard")


def tiny(cases, layer, layout="first", dtype="float32"):
    if layer in ("layer", "rms"):
        return cases.Case(layer, (3, 5, 24), layout, dtype)
    return cases.Case(layer, (2, 32, 3, 4) if layout == "first" else (2, 3, 4, 32), layout, dtype)


@pytest.mark.parametrize("layout", ["first", "last"])
@pytest.mark.parametrize("layer", ["batch", "instance", "group", "switchable", "layer", "rms"])
def test_plain_numpy_is_the_definition(load, cases, layer, layout):
    case = tiny(cases, layer, layout, "float64")
    x, dy, weight, bias = case.data()
    axis, logits = case.axis, {}
    if layer in ("layer", "rms"):
        statistics = [statistic(x.shape, (axis,))]
    else:
        kinds = {"batch": ["bn"], "instance": ["in"], "group": ["gn"]}
        kinds = kinds.get(layer, ["in", "ln", "bn"])
        statistics = [channel_statistic(kind, x.shape, case.num_groups, axis) for kind in kinds]
    if layer == "switchable":
        logits = {"mean_weight": np.ones(3), "var_weight": np.ones(3)}
    center = layer != "rms"
    naive = Naive(
        x, statistics, weight, bias if center else None, feature_axes=(axis,), center=center,
        eps=1e-5 if center else np.finfo(x.dtype).eps, **logits,
    )  # fmt: skip
    exact = naive.backward(dy)
    plain = load("plain")
    runner = plain.runner(case)
    np.testing.assert_allclose(runner.train(), naive.y, atol=1e-12)
    np.testing.assert_allclose(runner.backward(), exact["dx"], atol=1e-12)
    names = ["weight", "bias", "mean_weight", "var_weight"]
    for name, found in zip([n for n in names if n in exact], runner.gradients(), strict=True):
        np.testing.assert_allclose(found, exact[name], atol=1e-10)
    for activation in (None, *plain.ACTIVATIONS):
        fused = case._replace(activation=activation, residual=True)
        v = naive.y + fused.residual_array()
        y, slope = (v, 1.0) if activation is None else plain.ACTIVATIONS[activation](v)
        runner = plain.runner(fused)
        np.testing.assert_allclose(runner.train(), y, atol=1e-12)
        dx, dresidual = runner.backward()
        np.testing.assert_allclose(dresidual, dy * slope, atol=1e-12)
        np.testing.assert_allclose(dx, naive.backward(dy * slope)["dx"], atol=1e-12)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_slopes_of_plain_numpy(load, activation):
    v, h = np.linspace(-3, 3, 100), 1e-6  # 0 is not in it
    function = load("plain").ACTIVATIONS[activation]
    difference = (function(v + h)[0] - function(v - h)[0]) / (2 * h)
    np.testing.assert_allclose(function(v)[1], difference, atol=1e-8)


def test_names_of_cases(cases):
    Case = cases.Case
    assert Case("batch", (2, 3), "last", "float64").name == "batch 2x3 last float64"
    assert Case("layer", (2, 3)).name == "layer 2x3 first"
    assert Case("batch", (2, 3), masked=True, offset=1e6).name == "batch 2x3 at 1e+06 masked"
    names = [case.name for case in cases.CASES]
    # With NUMBANORM_BENCH_SMALL several images come out alike; without, every name is one case.
    code = "import cases; names = [c.name for c in cases.CASES]; assert len({*names}) == len(names)"
    environment = {k: v for k, v in os.environ.items() if k != "NUMBANORM_BENCH_SMALL"}
    subprocess.run([sys.executable, "-c", code], cwd=FOLDER, env=environment, check=True)
    assert all(names)


def results(value):
    return {"y": [value], "dx": [1.0], "evaluated": [2.0], "parameters": [[3.0, 4.0]]}


class TestCompare:
    def test_agreement(self, compare, cases):
        case = cases.Case("batch", (2, 3))
        found = {"numbanorm": {"out": results(1.0), "fresh": results(1.0)}}
        compare.check(case, {**found, "torch": {"fresh": results(1.0001)}, "jax": None})

    def test_disagreement_names_case_library_and_what(self, compare, cases):
        case = cases.Case("batch", (2, 3))
        found = {"numbanorm": {"out": results(1.0)}, "torch": {"fresh": results(1.1)}}
        with pytest.raises(AssertionError, match=r"batch 2x3, torch \(fresh\): y"):
            compare.check(case, found)

    @pytest.mark.parametrize("key", ["y", "dx", "evaluated"])
    def test_each_result_is_compared(self, compare, key):
        with pytest.raises(AssertionError, match=key):
            compare.assert_same({**results(1.0), key: [9.0]}, results(1.0), "here")

    def test_gradients_of_parameters_are_compared(self, compare):
        wrong = {**results(1.0), "parameters": [[3.0, 4.1]]}
        with pytest.raises(AssertionError, match="here: gradients of parameters"):
            compare.assert_same(wrong, results(1.0), "here")
        with pytest.raises(ValueError, match="longer"):
            compare.assert_same({**results(1.0), "parameters": []}, results(1.0), "here")

    def test_others_have_no_masks(self, compare, cases):
        case = cases.Case("batch", (2, 3), masked=True)
        ours = {"out": results(1.0), "fresh": results(1.0), "base": results(9.0)}
        compare.check(case, {"numbanorm": ours, "torch": {"fresh": results(9.0)}})
        for wrong in {**ours, "fresh": results(9.0)}, {**ours, "base": results(1.0)}:
            with pytest.raises(AssertionError, match="batch 2x3 masked"):
                compare.check(case, {"numbanorm": wrong, "torch": {"fresh": results(9.0)}})

    def test_table_and_summary(self, report):
        seconds = {f"numbanorm {p} {v}": 1e-3 for p in report.PHASES for v in ("out", "fresh")}
        seconds |= {f"torch {phase} fresh": 4e-3 for phase in report.PHASES}
        row = {
            "case": "batch 2x3",
            "layer": "batch",
            "groups": ["plain"],
            "seconds": {**seconds, "numbanorm copy": 5e-4},
            "bound": dict.fromkeys(report.PHASES, 0.75),
            "base": None,
            "ratios": {"torch": {"out": 4.0, "fresh": 3.0, "evaluate": 2.0}},
        }
        masked = {
            **row, "case": "batch 2x3 masked", "groups": ["masked"], "base": 1.25, "ratios": {},
        }  # fmt: skip
        head, first, second = report.table([row, masked], ["torch"]).splitlines()
        assert first.split() == "batch 2x3 0.5 1 1 1 0.75/0.75/0.75 2 - 8 4.00 3.00 2.00".split()
        assert second.split()[-5:] == ["1.25"] + ["-"] * 4
        assert "torch t+b" in head and "cold" not in head
        other = {**row, "case": "other"}
        lines = report.summary([row, other, masked], ["torch"]).splitlines()
        assert lines[0] == "plain, torch, out: geometric mean 4.00, least 4.00 (batch 2x3)"
        assert len(lines) == 4
        assert lines[-1] == "masked, over base: geometric mean 1.25, most 1.25 (batch 2x3 masked)"
        switchable = {
            **other, "layer": "switchable", "ratios": {"torch": {"out": 1.0}},
            "groups": ["half", "float16"],
        }  # fmt: skip
        half = {**row, "groups": ["half", "float16"]}
        mean = "geometric mean 2.00 (without SwitchableNorm 4.00), least 1.00 (other)"
        assert report.summary([switchable, half], ["torch"]) == f"float16, torch, out: {mean}"

    def test_the_table_of_the_readme(self, report):
        ratios = {"torch": {"out": 4.0, "fresh": 3.0, "evaluate": 2.0}}
        row = {"case": "a", "groups": ["plain"], "ratios": ratios, "base": None}
        slow = {"tuned": {"out": 0.25, "fresh": 1.0, "evaluate": 1.5}}
        rows = [
            row,
            {**row, "case": "b", "ratios": slow | {"torch": {**ratios["torch"], "out": 1.0}}},
        ]
        rows += [{**row, "case": "b masked", "groups": ["masked"], "base": 1.25, "ratios": {}}]
        assert report.markdown(rows).splitlines() == [
            "| PyTorch's time over ours |",
            "|---|---|",
            "| forward + backward, PyTorch as installed | 2.0 (1.00) |",
            "| … with memory settings that spare it fresh pages | 0.2 (0.25) |",
            "| evaluation, PyTorch as installed | 2.0 (2.00) |",
            "| evaluation, with these memory settings | 1.5 (1.50) |",
            "| without `out=`, forward + backward, PyTorch as installed | 3.0 (3.00) |",
            "| without `out=`, with these memory settings | 1.0 (1.00) |",
            "| a mask: our time over that without one, mean (most) | 1.25 (1.25) |",
            "",
            "- forward + backward: b 0.25",
            "- evaluation: none",
        ]

    @pytest.mark.parametrize("text", [None, "{}", "[]", "no json"])
    def test_what_cannot_be_loaded(self, compare, tmp_path, capsys, text):
        file = tmp_path / "rows.json"
        if text is not None:
            file.write_text(text)
        with pytest.raises(SystemExit) as exit:
            compare.main(["--load", str(file)])
        assert exit.value.code == 2
        assert "--load: a file that --json has written is needed" in capsys.readouterr().err

    def test_plot(self, report, tmp_path):
        row = {"case": "batch 2x3", "groups": ["plain"], "ratios": {"torch": {"out": 0.8}}}
        masked = {**row, "case": "batch 2x3 masked", "groups": ["masked"]}
        bars = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("matplotlib.axes.Axes.barh", lambda *a, **k: bars.append((a[2], k)))
            patch.setattr("matplotlib.figure.Figure.legend", lambda *_, **__: None)
            report.plot([row, masked], ["torch", "jax"], tmp_path / "bars.png")
        assert (tmp_path / "bars.png").stat().st_size > 0
        (torch, jax) = bars
        assert torch[0] == pytest.approx([-0.2])
        assert torch[1]["left"] == jax[1]["left"] == 1
        assert jax[0] == [0]  # nothing to compare with

    def test_some_values_of_16_bits_may_differ(self, compare):
        most = {**results(1.0), "y": [1.0] * 20}
        odd = {**most, "y": [1.0] * 19 + [2.0]}
        compare.assert_same(odd, most, "here", share=0.95)
        for share in (0.96, 1.0):
            with pytest.raises(AssertionError, match="here: y"):
                compare.assert_same(odd, most, "here", share=share)

    def test_no_clock_sees_more_than_the_layer(self, cases, compare):
        """PyTorch's phases return tensors, and no mode changes between them."""
        torch = pytest.importorskip("torch")
        runner = cases.torch_runner(tiny(cases, "batch")._replace(activation="relu", residual=True))
        y = runner.train()
        assert y.requires_grad and isinstance(y, torch.Tensor)
        dx, dresidual = runner.backward()
        assert dx.shape == dresidual.shape == y.shape
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.nn.Module, "train", None)
            assert not runner.evaluate().requires_grad
            evaluated = runner.array(runner.evaluate())
            runner.train()
            assert (runner.array(runner.evaluate()) != evaluated).any()  # running statistics

    @pytest.mark.parametrize(
        "how", ["batch last bfloat16", "rms last bfloat16", "group first float16",
                "instance last float32", "switchable first float32"],
    )  # fmt: skip
    def test_others_agree(self, cases, compare, how):
        pytest.importorskip("torch")
        if "bfloat16" in how:
            pytest.importorskip("ml_dtypes")
        alone = tiny(cases, *how.split())
        for case in (alone, alone._replace(activation="gelu", residual=True)):
            makers = {"numbanorm": cases.numbanorm_runner, "torch": cases.torch_runner}
            makers["in_place"] = lambda case: cases.torch_runner(case, in_place=True)
            found = {name: {"out": compare.results_of(makers[name](case))} for name in makers}
            compare.check(case, found)

    @pytest.mark.parametrize("activation", ["relu", "leaky_relu", "relu6", "silu", "gelu_tanh"])
    def test_others_have_the_activations(self, cases, compare, activation):
        pytest.importorskip("torch")
        case = tiny(cases, "batch")._replace(activation=activation)
        ours = compare.results_of(cases.numbanorm_runner(case))
        compare.assert_same(compare.results_of(cases.torch_runner(case)), ours, activation)

    def test_groups_of_cases(self, cases, compare):
        case = cases.Case("batch", (2, 3))
        half = case._replace(dtype="float16")
        fused = case._replace(activation="relu", residual=True)
        assert (case.groups, case.base) == (["plain"], None)
        assert (half.groups, half.base) == (["half", "float16"], case)
        assert fused.name == "batch 2x3 residual relu"
        assert fused.groups == ["fused", "fused float32", "ReLU family + residual float32"]
        assert fused.base == case
        assert case._replace(masked=True).base == case
        # x, y, dx, dy and the residual are 12 passes where the norm alone has 8.
        assert (case.passes, fused.passes) == ((3, 2, 5), (4, 3, 8))
        assert fused._replace(activation=None).passes == (4, 3, 6)
        for group in compare.GROUPS:
            assert cases.choose(["*"], [group])

    def test_sample_is_from_all_over(self, compare):
        assert compare.sample(np.arange(3.0)) == [0, 1, 2]
        assert compare.sample(np.arange(10_000.0))[-1] > 9980

    def test_no_case_fits(self, compare, capsys):
        with pytest.raises(SystemExit) as exit:
            compare.main(["--case", "no such case"])
        assert exit.value.code == 2
        assert "none of" in capsys.readouterr().err

    @pytest.mark.parametrize(
        "name", ["batch 8x16x8x8", "group 2x512x4x4 masked", "layer 8x8x768 last residual relu"]
    )
    def test_one_case(self, load, tmp_path, name):
        """Times are of no interest; asv's dry run in CI has the other libraries as well."""
        file = tmp_path / "rows.json"
        # PyTorch's threads wait for one another where the cores are busy.
        libraries = ["torch", "tuned", "jax"]
        ran = subprocess.run(
            [sys.executable, FOLDER / "compare.py", "--case", name, "--rounds", "1", "--cold",
             "--only", "plain", "masked", "fused", "--without", *libraries, "--json", file],
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert ran.returncode == 0, ran.stderr
        assert "load of other processes" in ran.stdout
        assert name in ran.stdout
        kept = json.loads(file.read_text())
        assert {"machine", "cpu", "date", "versions", "command"} < kept.keys()
        assert name in kept["command"]
        assert str(tmp_path) not in kept["command"]
        again = subprocess.run(
            [sys.executable, FOLDER / "compare.py", "--load", file],
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert again.stdout.endswith(ran.stdout[ran.stdout.index("milliseconds") :])
        [row] = kept["rows"]
        assert row["seconds"]["numbanorm train out"] > 0
        assert row["ratios"] == {}
        assert row["seconds"]["numbanorm backward cold"] > 0
        assert (row["base"] or 0) > 0 if " " in name[6:] else row["base"] is None


def benchmarks_of(module):
    """Yield the classes of a module that asv finds, and the names of their benchmarks."""
    for name, found in vars(module).items():
        if inspect.isclass(found) and not name.startswith("_"):
            names = [
                n for n in dir(found) if n.split("_")[0] in ("time", "timeraw", "peakmem", "track")
            ]
            if names:
                yield found, names


@pytest.mark.parametrize("name", MODULES)
def test_benchmarks_run_and_leave_out_nothing_of_numbanorm(load, name, tmp_path):
    """One combination of parameters for each class and each layer; asv runs them all in CI."""
    if name == "exchange":
        pytest.importorskip("mpi4py")
    module = load(f"benchmarks.{name}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load("benchmarks.prepared"), "SCRATCH", tmp_path)
        for found, names in benchmarks_of(module):
            first, *rest = getattr(found, "params", [[]])
            for params in itertools.product(first, *(values[:1] for values in rest)):
                for benchmark in names:
                    # It takes seconds, and CI runs it; asv runs what timeraw returns.
                    if benchmark == "track_compile":
                        continue
                    instance = found()
                    instance.setup(*params)
                    getattr(instance, benchmark)(*params)


@pytest.mark.parametrize("name", [*MODULES, "ratios"])
def test_benchmarks_have_names_versions_and_units(load, name):
    """A cell of the grid is the mean over all parameters: other libraries have their own."""
    for found, names in benchmarks_of(load(f"benchmarks.{name}")):
        assert name == "baselines" or "library" not in getattr(found, "param_names", ())
        for benchmark in names:
            function = getattr(found, benchmark)
            assert function.pretty_name
            assert isinstance(found.version, str)
            if benchmark.startswith("track"):
                assert getattr(function, "unit", None) or found.unit


def test_setup_raises_where_a_result_is_wrong(load, cases, monkeypatch, tmp_path):
    prepared = load("benchmarks.prepared")
    monkeypatch.setattr(prepared, "SCRATCH", tmp_path)
    wrong = cases.numbanorm_runner

    def runner(case, fresh=False):
        made = wrong(case, fresh)
        return made._replace(train=lambda: made.train() + np.float32(0.01))

    monkeypatch.setattr(prepared.cases, "numbanorm_runner", runner)
    with pytest.raises(AssertionError, match="batch 3x4x2, numbanorm: y"):
        prepared.runner(cases.Case("batch", (3, 4, 2)))


def test_what_is_missing_is_left_out(load, monkeypatch):
    prepared = load("benchmarks.prepared")
    with pytest.raises(NotImplementedError, match="no_such_library"):
        prepared.need("no_such_library")
    with pytest.raises(NotImplementedError, match="has no NoSuchLayer"):
        prepared.need("numbanorm", "NoSuchLayer")
    # A commit of old that cannot be imported is left out, the checkout itself is an error.
    monkeypatch.setitem(sys.modules, "numbanorm", None)
    monkeypatch.delenv("ASV_COMMIT", raising=False)
    with pytest.raises(ImportError):
        prepared.need("numbanorm")
    monkeypatch.setenv("ASV_COMMIT", "0" * 40)
    with pytest.raises(NotImplementedError):
        prepared.need("numbanorm")


TABLE = """
| Change | Before [a] <x> | After [b] <y> | Ratio | Benchmark (Parameter) |
|--------|----------------|---------------|-------|-----------------------|
|        | 1.00±0ms       | 1.01±0ms      | 1.01  | moments.time('a', 1)  |
| {mark} | 1.00±0ms       | 2.00±0ms      | {ratio} | forward.time('b | c') |
"""


def test_errors_of_16_bits(load, cases, monkeypatch, capsys):
    pytest.importorskip("torch")
    rounding = load("rounding")
    monkeypatch.setattr(rounding, "OFFSETS", (0, 10))
    table = rounding.main(["--dtype", "float16"])
    assert len(table) == len(capsys.readouterr().out.splitlines()) - 2 == 10
    # The float32 results differ from the exact ones in their last places.
    assert all(errors[0] < 0.51 for row in table.values() for errors in row)


class TestRegression:
    @pytest.mark.parametrize(
        ("mark", "ratio", "asv_status", "status", "message"),
        [
            ("", "1.10", 0, 0, "NO REGRESSION: none of 2 benchmarks"),
            ("-", "0.50", 0, 0, "NO REGRESSION"),
            ("", "n/a", 0, 0, "; 1 could not be compared"),
            ("x", "2.00", 0, 0, "; 1 could not be compared"),
            ("+", "2.00", 1, 1, "forward.time('b | c') (2.00 times)"),
            # A benchmark fails in the second commit, or in both: asv ends with 1 and 2.
            ("!", "n/a", 1, 2, "COULD NOT MEASURE"),
            ("", "1.10", 2, 2, "COULD NOT MEASURE"),
        ],
    )
    def test_verdict(self, regression, mark, ratio, asv_status, status, message):
        found, text = regression.verdict(TABLE.format(mark=mark, ratio=ratio), asv_status, 1.3)
        assert found == status
        assert message in text

    def test_nothing_measured(self, regression):
        assert regression.verdict("", 0, 1.3)[0] == 2
        assert regression.verdict("Unknown commit", 1, 1.3)[0] == 2

    def test_arguments(self, regression, monkeypatch, capsys):
        asked = []

        def asv(*arguments):
            asked.append(arguments)
            return TABLE.format(mark="+", ratio="2.00"), 1

        monkeypatch.setattr(regression, "asv", asv)
        monkeypatch.setattr(regression, "git", lambda *_: "")
        monkeypatch.setattr(regression, "other_load", lambda: 0.25)
        assert regression.main(["--factor", "1.5", "--bench", "small"]) == 1
        printed = capsys.readouterr().out
        assert "REGRESSION: 1 of 2" in printed
        assert "load of other processes: 0.25, then 0.25 cores" in printed
        assert asked[-1][0] == "continuous"
        assert asked[-1][-2:] == ("HEAD~1", "HEAD")
        assert asked[-1][asked[-1].index("--factor") + 1] == "1.5"
        # What seems slower is measured once more.
        first, second = (call[call.index("--bench") + 1] for call in asked[-2:])
        assert first == "small"
        assert re.search(second, "forward.time('b | c')")
        assert not re.search(second, "moments.time('a', 1)")
        regression.main(["v1", "v2"])
        assert asked[-1][-2:] == ("v1", "v2")

    @pytest.mark.parametrize(
        ("main", "origin", "base"),
        [("left", "fetched", "left"), ("this", "fetched", "fetched"), ("this", "", "HEAD~1")],
    )
    def test_base(self, regression, monkeypatch, main, origin, base):
        """Where the branch left main; on main, what was fetched, or the commit before."""
        answers = {"main": main, "origin/main": origin, "--verify": "this"}
        monkeypatch.setattr(regression, "git", lambda _, key, __: answers[key])
        assert regression.base_of("HEAD") == base

    def test_a_commit_and_itself(self, regression, monkeypatch, capsys):
        monkeypatch.setattr(regression, "git", lambda *_: "this")
        with pytest.raises(SystemExit) as exit:
            regression.main(["main", "HEAD"])
        assert exit.value.code == 2
        assert "main and HEAD are the same commit" in capsys.readouterr().err

    def test_interrupted(self, regression, monkeypatch, capsys):
        asked = []

        def asv(*arguments):
            asked.append(arguments[0])
            if arguments[0] == "continuous":
                raise KeyboardInterrupt
            return "", 0

        monkeypatch.setattr(regression, "asv", asv)
        assert regression.main([]) == 2
        assert asked[-2:] == ["continuous", "compare"]
        assert "interrupted" in capsys.readouterr().out

    @pytest.mark.parametrize("known", [None, "another", "this"])
    def test_asv_is_told_of_a_machine_that_it_does_not_know(
        self, regression, monkeypatch, tmp_path, known
    ):
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setattr("platform.node", lambda: "this")
        if known is not None:
            (tmp_path / ".asv-machine.json").write_text(json.dumps({known: {}, "version": 1}))
        asked = []
        monkeypatch.setattr(regression, "asv", lambda *a: asked.append(a) or ("", 2))
        monkeypatch.setattr(regression, "other_load", lambda: 0.25)
        regression.main([])
        assert (("machine", "--yes") in asked) == (known != "this")

    def test_a_busy_machine_proves_nothing(self, regression, monkeypatch, capsys):
        answer = TABLE.format(mark="+", ratio="2.00"), 1
        monkeypatch.setattr(regression, "asv", lambda *_: answer)
        monkeypatch.setattr(regression, "other_load", lambda: 1.5)
        assert regression.main([]) == 2
        assert "COULD NOT MEASURE, the machine is not idle" in capsys.readouterr().out
        assert regression.main(["--max-load", "2"]) == 1

    def test_what_is_slower_only_once_does_not_count(self, regression, monkeypatch):
        answers = iter(
            [(TABLE.format(mark="+", ratio="2.00"), 1), (TABLE.format(mark="", ratio="1.1"), 0)]
        )
        monkeypatch.setattr(
            regression, "asv", lambda verb, *_: next(answers) if verb == "continuous" else ("", 0)
        )
        monkeypatch.setattr(regression, "other_load", lambda: 0.25)
        assert regression.main([]) == 0

    def test_factor_of_one(self, regression, capsys):
        with pytest.raises(SystemExit):
            regression.main(["--factor", "1"])
        assert "more than 1 is needed" in capsys.readouterr().err


# A package of another folder, whose layer makes zeros.
OTHER = """
import numpy as np

class BatchNorm:
    def __init__(self, channels, **kind):
        self.weights = {"weight": np.ones(channels), "bias": np.zeros(channels)}
    def parameters(self):
        return self.weights
    gradients = parameters
    training = True
    def train(self, mode):
        self.training = mode
    def forward(self, x, mask, out):
        out[...] = 0
        return out
    def backward(self, dy, out):
        return self.forward(dy, None, out)
"""


class TestTurns:
    def test_two_states(self, turns, cases, capsys):
        import numbanorm

        folder = str(FOLDER.parent)
        arguments = ["--case", "batch 32x64", "layer 32x128*", "--rounds", "2", "--threads", "1"]
        assert turns.main([folder, folder, *arguments]) == 0
        title, _, head, *rows = capsys.readouterr().out.splitlines()
        assert title == f"{folder} over {folder}"
        assert head.split() == "copies train ratio evaluate ratio backward ratio".split()
        assert [row[:36].rstrip() for row in rows] == ["batch 32x64", "layer 32x128 last"]
        for row in rows:
            _, *times = row[36:].split()
            assert len(times) == 6
            assert all(float(number) > 0 for number in times)
        assert importlib.import_module("numbanorm") is numbanorm

    def test_other_results_are_not_timed(self, turns, cases, tmp_path):
        (tmp_path / "numbanorm").mkdir()
        (tmp_path / "numbanorm" / "__init__.py").write_text(OTHER)
        with pytest.raises(AssertionError, match="batch 32x64"):
            turns.main([str(FOLDER.parent), str(tmp_path), "--case", "batch 32x64"])

    def test_no_state(self, turns):
        with pytest.raises(SystemExit, match="neither a folder with numbanorm in it nor a commit"):
            turns.main(["no-such-commit"])

    def test_no_case(self, turns, capsys):
        with pytest.raises(SystemExit):
            turns.main(["--case", "nothing"])
        assert "--case: none of" in capsys.readouterr().err


class TestDashboard:
    def test_scripts_become_local(self, dashboard):
        page, names = dashboard.localize(
            '<script src="https://a.b/c/jquery-3.3.1.min.js" integrity="sha" crossorigin="x" '
            'onerror="f()"></script><link href="https://d/bootstrap.min.css"><a href="https://e/">'
            '<script src="asv.js">'
        )
        assert names == ["jquery-3.3.1.min.js", "bootstrap.min.css"]
        assert page == (
            '<script src="scripts/jquery-3.3.1.min.js" onerror="f()"></script>'
            '<link href="scripts/bootstrap.min.css"><a href="https://e/"><script src="asv.js">'
        )

    def test_a_script_that_is_new(self, dashboard):
        with pytest.raises(ValueError, match=r"https://a\.b/new\.js"):
            dashboard.localize('<script src="https://a.b/new.js">')

    def test_the_pages_of_this_asv(self, dashboard):
        asv = pytest.importorskip("asv")
        page = (Path(asv.__file__).parent / "www" / "index.html").read_text()
        local, names = dashboard.localize(page)
        assert {name for name in names} == set(dashboard.SCRIPTS)
        assert "integrity" not in local

    def test_serves_a_folder(self, dashboard, tmp_path):
        from urllib.request import urlopen

        (tmp_path / "index.html").write_text("here")
        with dashboard.served(tmp_path) as address, contextlib.closing(urlopen(address)) as page:
            assert page.read() == b"here"

    def test_arguments(self, dashboard, monkeypatch, tmp_path):
        done = []
        monkeypatch.setattr(dashboard, "HTML", tmp_path / "html")
        monkeypatch.setattr(dashboard, "check_clone", lambda: None)
        monkeypatch.setattr(dashboard, "reachable", lambda _: True)
        monkeypatch.setattr(dashboard, "publish", lambda: done.append("publish"))
        monkeypatch.setattr(dashboard, "make_offline", lambda html: done.append("offline"))

        def look(address, benchmark, folder, browser):
            done.append((benchmark, browser))
            (folder / "plot.png").write_bytes(b"png")

        monkeypatch.setattr(dashboard, "look", look)
        (tmp_path / "html").mkdir()
        names = {dashboard.BENCHMARK.partition("?")[0]: {}}
        (tmp_path / "html" / "index.json").write_text(json.dumps({"benchmarks": names}))
        assert dashboard.main([]) == 0
        picture = tmp_path / "picture.png"
        arguments = ["--offline", "--picture", str(picture), "--browser", "/b"]
        assert dashboard.main(arguments) == 0
        assert done == ["publish", "publish", "offline", (dashboard.BENCHMARK, "/b")]
        assert picture.read_bytes() == b"png"

    def test_says_what_to_do(self, dashboard, monkeypatch, tmp_path):
        monkeypatch.setattr(dashboard, "RESULTS", tmp_path)
        with pytest.raises(SystemExit, match=r"there are no results in .*--measure"):
            dashboard.publish()
        (tmp_path / "machine").mkdir()
        (tmp_path / "machine" / "0123-env.json").write_text("{}")
        monkeypatch.setattr(dashboard, "find_spec", lambda _: None)
        with pytest.raises(SystemExit, match="asv is not installed: pip install"):
            dashboard.publish()
        monkeypatch.setattr(dashboard, "HERE", tmp_path)
        with pytest.raises(SystemExit, match="run it in a clone"):
            dashboard.check_clone()
        monkeypatch.setenv("PATH", "")
        with pytest.raises(SystemExit, match="git is needed"):
            dashboard.check_clone()

    def test_without_playwright(self, dashboard, monkeypatch, tmp_path):
        monkeypatch.setitem(sys.modules, "playwright.sync_api", None)
        with pytest.raises(SystemExit, match="playwright is not installed: pip install"):
            dashboard.look("http://127.0.0.1/", dashboard.BENCHMARK, tmp_path, None)

    def test_without_a_network(self, dashboard, monkeypatch, tmp_path):
        (tmp_path / "html").mkdir()
        page = tmp_path / "html" / "index.html"
        page.write_text('<script src="https://nowhere.invalid/jquery-3.3.1.min.js">')
        assert not dashboard.reachable(tmp_path / "html")
        monkeypatch.setenv("PATH", "")
        with pytest.raises(SystemExit, match="cannot be reached, and npm could not install them"):
            dashboard.make_offline(tmp_path / "html")

    def test_a_taken_port(self, dashboard, tmp_path):
        with dashboard.served(tmp_path) as address:
            port = int(address.rstrip("/").rpartition(":")[2])
            with pytest.raises(SystemExit, match="--port 0"), dashboard.served(tmp_path, port):
                pass
