"""All code of the benchmark and of the gate for GPUs, tiny, on a CPU.

On a GPU they run rarely, for a few minutes. Here they run from a copy of the repository that is not installed.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
import torch

from engine.errors import DeviceFailedError
from engine.executor.tiers.swapper import LayerGates, PlainCopies
from engine.simulator.step_table import StepTable

ROOT = Path(__file__).parents[1]
FOLDERS = ("benchmarks/peers", "benchmarks", "benchmarks/gpu")
SECTIONS = {
    "roofs",
    "llama",
    "attention",
    "conversations",
    "accuracy",
    "tiles",
    "opt",
    "steps_opt",
    "steps_llama",
    "figure_12",
    "peer",
    "plots",
}
TABLES = {"steps_opt_table", "steps_llama_table"}
# What the launcher starts here, each in a process of its own as all groups on a GPU; the others share one process, whose
# imports take most of the time.
LAUNCHED = ("llama", "plots")
OWN_ENGINE = "this is the engine of the copy"
needs_interpreter = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton's interpreter")


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an archive of the repository has, in a folder of its own; its engine says so in each process that imports it."""
    folder = tmp_path_factory.mktemp("copy") / "unpacked"
    for name in ("engine", "benchmarks"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    with (folder / "engine/__init__.py").open("a") as file:
        file.write(f"\nprint({OWN_ENGINE!r}, flush=True)\n")
    return folder


def start(unpacked: Path, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """As it is started by hand from the root of the copy, whatever is installed in this environment."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TRITON_INTERPRET")}
    return subprocess.run(
        [sys.executable, f"benchmarks/gpu/{script}", "--smoke", *arguments],
        cwd=unpacked,
        capture_output=True,
        text=True,
        env={**environment, "OMP_NUM_THREADS": "1"},
    )


def figures_of(folder: Path, section: str):
    return json.loads((folder / f"{section}.json").read_text())["figures"]


@pytest.mark.slow
@needs_interpreter
def test_every_section_of_the_benchmark_runs(unpacked, module, tmp_path):
    out = tmp_path / "results"
    out.mkdir()
    others = [group.name for group in module("run").GROUPS if group.name not in LAUNCHED]
    process = start(unpacked, "sections.py", *others, "--out", str(out))
    assert process.returncode == 0, process.stdout[-5000:] + process.stderr[-1000:]
    assert OWN_ENGINE in process.stdout
    process = start(
        unpacked, "run.py", "--groups", *LAUNCHED, "--out", str(out), "--pack", str(tmp_path / "packed.tgz")
    )
    logs = "\n".join(path.read_text()[-2000:] for path in out.glob("*.log"))
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-1000:] + logs
    written = {path.stem for path in out.glob("*.json")}
    assert written == SECTIONS | TABLES | {"groups"}
    for section in SECTIONS:
        content = json.loads((out / f"{section}.json").read_text())
        assert content["is_complete"], section
    groups = json.loads((out / "groups.json").read_text())["groups"]
    names = {section.split("_")[0] if section.startswith("steps") else section for section in SECTIONS}
    assert {*others, *LAUNCHED} == names - {"roofs"}  # which the first model measures first
    assert [group["name"] for group in groups] == list(LAUNCHED)
    for group in groups:
        assert group["outcome"] == "complete"
        assert OWN_ENGINE in (out / f"{group['name']}.log").read_text()
    pictures = {path.stem for path in out.glob("*.png")}
    assert pictures == {"attention", "figure_12", "llama", "opt", "conversations"}
    packed = (
        shutil.unpack_archive(tmp_path / "packed.tgz", tmp_path / "unpacked_results") or tmp_path / "unpacked_results"
    )
    assert {path.name for path in packed.iterdir()} == {path.name for path in out.iterdir()}
    assert set(figures_of(out, "conversations")["two_tiers_over"]) == {"stateless", "GPU only"}
    assert set(figures_of(out, "peer")["two_tiers_over"]) == {"stateless", "GPU only", "transformers"}
    llama = figures_of(out, "llama")
    assert {(row["by"], row["way"]) for row in llama["swaps"]} == {("dma", way) for way in ("in", "out", "both")}
    assert all(row["device_ms"] > 0 for row in llama["decode"])
    assert list(dict.fromkeys(row["by"] for row in llama["hidden"])) == ["as served", "dma, without graphs"]
    assert [row["num_new_tokens"] for row in llama["prompts_by_graphs"]] == [8]
    assert [row.get("batch") for row in llama["graphs_against_eager"]] == [1, 2, None]  # and a step with prompts
    assert set(llama["profiles"]) == {"decode of 1", "decode of 2", "prompt of 32"}
    assert not any("failure" in row for row in figures_of(out, "tiles"))
    for model in ("opt", "llama"):
        table = StepTable.load(out / f"steps_{model}_table.json")
        assert list(table.num_tokens_s)[-1] == 64
        assert list(table.decodes_s) == [1, 2]
        steps = figures_of(out, f"steps_{model}")
        assert [row["kind"] for row in steps["steps"]] == ["decodes", "prompts", "mixed"]
        assert all(row["ms"] > 0 and row["over_table"] > 0 for row in steps["steps"])


@pytest.mark.slow
@needs_interpreter
def test_every_check_of_the_gate_runs(unpacked, tmp_path):
    process = start(unpacked, "gate.py", "--out", str(tmp_path / "gate.json"))
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-3000:]
    assert OWN_ENGINE in process.stdout
    checks = json.loads((tmp_path / "gate.json").read_text())["checks"]
    assert all(check["is_ok"] for check in checks)
    kinds = {check["name"].rsplit(": ", 1)[-1] for check in checks}
    assert kinds == {
        *("graphs", "prompts by graphs", "swaps", "late swap-ins", "conversations", "compiled layers", "shutdown"),
        *("cold tiers", "speculation", "sampling", "adapters"),
        *("disk tier", "engine started three times", "tier sized from memory"),
    }
    assert process.stdout.splitlines()[-1].endswith("failed: none")


@pytest.fixture
def module(monkeypatch) -> Iterator[Callable[[str], ModuleType]]:
    """Imports a module of benchmarks/gpu; afterwards it is forgotten, with all that it brought from benchmarks."""
    for folder in FOLDERS:
        monkeypatch.syspath_prepend(str(ROOT / folder))
    before, environment = set(sys.modules), dict(os.environ)
    yield importlib.import_module
    os.environ.clear()
    os.environ.update(environment)
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(ROOT / "benchmarks")):
            del sys.modules[name]


@pytest.mark.parametrize(
    ("p90_s", "turns_per_s"),
    [
        (0.1, 4.0),  # none is as soon
        (0.2, 4.0),
        (0.3, 5.0),  # halfway
        (0.5, 6.0),  # later, and slower than before
        (9.0, 6.0),
    ],
)
def test_the_throughput_at_a_p90_lies_between_the_runs_beside_it(module, p90_s, turns_per_s):
    rows = [{"ttft_p90_s": p90, "turns_per_s": per_s} for p90, per_s in ((0.4, 6.0), (0.2, 4.0), (0.6, 5.0))]
    assert module("conversations").turns_per_s_at(p90_s, rows) == pytest.approx(turns_per_s)


def test_two_tiers_are_compared_at_each_of_their_p90(module):
    rows = [
        {"configuration": name, "active": active, "ttft_p90_s": p90_s, "turns_per_s": per_s}
        for name, active, p90_s, per_s in (
            ("two tiers", 8, 0.3, 10.0),
            ("two tiers", 16, 0.4, 12.0),
            ("a", 4, 0.3, 4.0),
        )
    ]
    compared = module("conversations").compare(rows)
    assert [each["over"] for each in compared["at_equal_p90"]] == [{"a": 2.5}, {"a": 3.0}]
    assert compared["two_tiers_over"] == {"a": 3.0}
    assert module("conversations").compare(rows[2:])["two_tiers_over"] == {}


def test_a_history_is_sent_before_the_turns_that_count(module):
    workload, sent = module("workload"), []

    async def generate(turn):
        sent.append(turn)
        yield [7] * turn.output_len

    work = workload.Workload("w", 5, 2, 3, 10, 4, history_len=20, is_shuffled=True)
    result = asyncio.run(workload.run_workload(work, generate, lambda: None))
    history, turns = sent[:5], sent[5:]
    assert {len(turn.prompt) for turn in history} == {20}
    assert [len(turn.prompt) for turn in turns if turn.session == 1] == [34, 48, 62]
    assert len(result["turns"]) == 15
    assert max(len(turn.prompt) + 4 for turn in turns) == work.max_context_len == 66
    assert [turn.session for turn in turns] != [session for _ in range(3) for session in range(5)]


@pytest.mark.parametrize("num_layers", [2, 32, 200])
def test_deeper_models_round_more_and_wrong_graphs_still_fail(module, num_layers):
    eager = module("eager")
    tolerances = eager._tolerances(torch.bfloat16, num_layers)
    expected, noise = torch.randn(2, 3, 1000, generator=torch.Generator().manual_seed(0))
    tokens = [expected.argmax(dim=1).tolist()]
    rounded = expected + 0.02 * tolerances[0] * expected.abs().amax() * noise.clamp(-3, 3)
    assert eager._compare(rounded, expected, tokens, *tolerances).largest > 0
    with pytest.raises(AssertionError, match="graphs give other logits than eager steps"):
        eager._compare(expected.flip(0), expected, tokens, *tolerances)
    with pytest.raises(AssertionError, match="graphs choose other tokens than eager steps"):
        eager._compare(expected, expected, [expected.argmin(dim=1).tolist()], *tolerances)
    shallow = eager._tolerances(torch.bfloat16, 2)
    assert shallow == eager.TOLERANCES[torch.bfloat16]
    assert (tolerances[0] > 0.0429) == (num_layers > 2)


def test_a_step_that_does_not_wait_for_its_context_fails_the_gate(module, subject, monkeypatch):
    checks = module("checks")
    assert "4 steps" in checks.check_late_swap_ins(subject)
    copy = PlainCopies.swap_in

    def copy_late(*args) -> None:
        time.sleep(0.05)
        copy(*args)

    monkeypatch.setattr(PlainCopies, "swap_in", copy_late)
    assert "4 steps" in checks.check_late_swap_ins(subject)
    monkeypatch.setattr(LayerGates, "wait", lambda *_: None)
    with pytest.raises(AssertionError, match="other logits"):
        checks.check_late_swap_ins(subject)


@pytest.fixture
def subject(module, tmp_path):
    """The tiny Llama of the gate's smoke run."""
    checks, setting = module("checks"), module("setting")
    made = checks.Subject(setting.for_smoke(), tmp_path, "tiny Llama", checks.SHAPES["tiny Llama"], torch.float32)
    yield made
    made.close()


def test_a_graph_that_gives_what_it_gave_before_fails_the_gate(module, subject, monkeypatch):
    """As one that reads freed memory may: the output is written once and not anew.

    Its first replay is a real one: what a recording leaves was computed from a cache that nothing was written to yet.
    """
    graph = module("stand_ins").RerunGraph
    replay = graph.replay
    replayed: set[int] = set()

    def replay_once(self):
        if id(self) not in replayed:
            replayed.add(id(self))
            replay(self)

    monkeypatch.setattr(graph, "replay", replay_once)
    with pytest.raises(AssertionError, match="graphs give other logits than eager steps"):
        module("checks").check_graphs(subject)


def test_a_size_that_was_not_recorded_fails_the_gate(module, subject):
    graphs = subject.executor.runner.graphs
    graphs.sizes = graphs.sizes[:-1]
    with pytest.raises(AssertionError, match="sizes are missing"):
        module("checks").check_graphs(subject)


def test_a_copy_that_is_left_out_fails_the_gate(module, subject, monkeypatch):
    copier = module("steps").DmaCopier
    copy = copier.copy
    monkeypatch.setattr(
        copier, "copy", lambda self, target, source, copies, columns: copy(self, target, source, copies[1:], columns)
    )
    with pytest.raises(AssertionError, match=r"wrong bytes in the ... tier \(by dma, whole blocks\)"):
        module("checks").check_swaps(subject)


def test_a_cache_that_holds_something_else_fails_the_gate(module, subject, monkeypatch):
    """Blocks that come back from the CPU tier are another conversation's."""
    swapper = subject.executor.runner.swapper
    begin = swapper.begin

    def begin_and_mix(plan):
        wait = begin(plan)
        if wait is None:
            return None

        def wait_and_mix(layer):
            wait(layer)  # the layer's copies are complete: they cannot replace what is written here
            swapper._gpu.storage[[copy.target for copy in plan.swap_ins]] = 0.5

        return wait_and_mix

    monkeypatch.setattr(swapper, "begin", begin_and_mix)
    with pytest.raises(AssertionError, match="behind it"):
        module("checks").check_conversations(subject)


def test_layers_that_fall_back_to_what_was_written_fail_the_gate(module, subject, monkeypatch):
    """One more guard, which no step of it passes."""
    checks = module("checks")
    subject._options["compile_layers"] = True
    monkeypatch.setattr(checks.compiled_layers, "COMPILER", "aot_eager")
    executor = subject.executor
    torch._dynamo.reset()  # what was compiled is forgotten; the layers do not know it
    assert executor.loaded.has_compiled_layers
    with pytest.raises(Exception, match="fail_on_recompile"):
        checks.check_compiled(subject)


@needs_interpreter
def test_a_cold_block_of_another_context_fails_the_gate(module, subject, monkeypatch):
    """Its record is right, and restored to another block."""
    from engine.executor.tiers.cold_copy_kernel import ColdDecoder

    copy = ColdDecoder.copy

    def copy_to_next(self, target, source, copies, columns):
        turned = [*copies[1:], *copies[:1]]
        mixed = [one._replace(target=other.target) for one, other in zip(copies, turned, strict=True)]
        copy(self, target, source, mixed, columns)

    monkeypatch.setattr(ColdDecoder, "copy", copy_to_next)
    subject.sizes = replace(subject.sizes, num_swapped=4)
    with pytest.raises(AssertionError, match=r"restored values are not the reference's \(fp8, whole blocks\)"):
        module("features").check_cold_tiers(subject)


@needs_interpreter
def test_a_record_that_is_not_the_references_fails_the_gate(module, subject, monkeypatch):
    """As by a kernel that rounds otherwise: a few numbers are one off."""
    from engine.executor.tiers.cold_copy_kernel import ColdEncoder

    copy = ColdEncoder.copy

    def copy_and_change(self, target, source, copies, columns):
        copy(self, target, source, copies, columns)
        target[copies[0].target, 300] ^= 1

    monkeypatch.setattr(ColdEncoder, "copy", copy_and_change)
    with pytest.raises(AssertionError, match=r"1 of \d+ bytes of a record are not the reference's"):
        module("features").check_cold_tiers(subject)


def test_tokens_behind_guesses_that_are_chosen_otherwise_fail_the_gate(module, subject, monkeypatch):
    """Without the biases of their request."""
    states = importlib.import_module("engine.executor.sampler").SamplingState
    behind = states.behind

    def behind_without_biases(self, guesses):
        copies = behind(self, guesses)
        for state in copies:
            state.params = replace(state.params, logit_bias=())
        return copies

    monkeypatch.setattr(states, "behind", behind_without_biases)
    with pytest.raises(AssertionError, match=r"with guesses, .* without"):
        module("features").check_speculation(subject)


def test_a_draw_that_depends_on_the_batch_fails_the_gate(module, subject, monkeypatch):
    features, sampler = module("features"), importlib.import_module("engine.executor.sampler")
    invert_cdf = sampler._invert_cdf
    monkeypatch.setattr(
        sampler, "_invert_cdf", lambda probs, uniforms: invert_cdf(probs, uniforms * (0.5 ** len(probs)))
    )
    with pytest.raises(AssertionError, match="in a batch"):
        features.check_sampling(subject)


def test_log_probabilities_of_other_logits_fail_the_gate(module, subject, monkeypatch):
    """Of the right tokens, and by the same code for all: only the logits themselves tell."""
    runner = module("checks").model_runner
    init = runner.Draw.__init__

    def init_with_others(self, batch, logits, *arguments):
        init(self, batch, logits, *arguments)
        if self._logprobs is not None:
            self._logprobs = self._logprobs + 0.01
            self._copy = importlib.import_module("engine.executor.sampler").HostCopy(self._pack())

    monkeypatch.setattr(runner.Draw, "__init__", init_with_others)
    with pytest.raises(AssertionError, match="a log-probability is off by"):
        module("features").check_sampling(subject)


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("rows_of", lambda self, used, segments, send: []),
        ("find", lambda self, identity: next(iter(self._loaded.values())) if identity else None),
    ],
    ids=["nothing is added", "one for another"],
)
def test_adapters_that_are_not_added_fail_the_gate(module, tmp_path, monkeypatch, name, broken):
    checks, setting = module("checks"), module("setting")
    options = {"load_format": "auto", "adapter_folder": str(tmp_path)}
    shape = checks.SHAPES["tiny Llama"]
    adapted = checks.Subject(setting.for_smoke(), tmp_path, "adapted Llama", shape, torch.float32, **options)
    monkeypatch.setattr(f"engine.executor.lora.adapters.Adapters.{name}", broken)
    try:
        with pytest.raises(AssertionError, match="from those with its weights merged"):
            module("features").check_adapters(adapted, tmp_path / "adapters")
    finally:
        adapted.close()


def test_an_engine_that_finds_nothing_on_its_disk_fails_the_gate(module, subject, tmp_path, monkeypatch):
    monkeypatch.setattr("engine.core.engine_core.EngineCore.restore", lambda *_: None)
    with pytest.raises(AssertionError, match="the second engine found nothing on the disk"):
        module("features").check_disk_tier(subject, tmp_path / "kv")


def test_checks_are_selected_by_name_each_with_the_shutdown_of_its_subject(module):
    checks = module("checks")
    names = [name for name, _ in checks.all_checks(module("setting").for_smoke(), Path("nowhere"))]

    def selected(pattern: str) -> list[str]:
        every = checks.all_checks(module("setting").for_smoke(), Path("nowhere"))
        return [name for name, _ in checks.selected(every, pattern)]

    assert selected("") == names
    assert selected("tiny OPT float32: swaps|^tier sized") == [
        "tiny OPT float32: swaps",
        "tiny OPT float32: shutdown",
        "tier sized from memory",
    ]
    assert selected("shutdown") == []
    assert len(set(names)) == len(names)


def test_a_gate_of_no_check_fails(module, monkeypatch, capsys):
    gate = module("gate")
    monkeypatch.setattr(gate.environment, "IS_SMOKE", True)
    monkeypatch.setattr(gate.faulthandler, "dump_traceback_later", lambda *_, **__: None)  # it wants a real file
    monkeypatch.setattr(sys, "argv", ["gate.py", "--smoke", "--only", "no such check"])
    with pytest.raises(SystemExit) as end:
        gate.main()
    assert end.value.code == 2
    assert "no check has a name in which 'no such check' is found" in capsys.readouterr().err


def test_a_check_that_fails_is_reported_and_a_broken_device_ends_the_gate(module, monkeypatch, capsys, tmp_path):
    gate = module("gate")
    ran = []

    def fails() -> str:
        raise ValueError("a wrong number")

    def last() -> str:
        ran.append("last")
        return "fine"

    def broken(device: torch.device) -> None:
        if ran:
            raise DeviceFailedError("an illegal address")

    monkeypatch.setattr(gate, "check_device", broken)
    checks = [("a", fails), ("b", last), ("c", last)]
    results, reason = gate.run_checks(checks, torch.device("cpu"), tmp_path / "gate.json")
    assert reason == "an illegal address"
    assert [result.is_ok for result in results] == [False, True]
    assert ran == ["last"]
    output = capsys.readouterr().out
    assert "FAIL a" in output
    assert "ValueError: a wrong number" in output
    report = json.loads((tmp_path / "gate.json").read_text())
    assert report["device_failure"] == "an illegal address"
    assert [check["is_ok"] for check in report["checks"]] == [False, True]


@pytest.fixture
def run(module, monkeypatch, tmp_path) -> ModuleType:
    """The launcher, over a script that does what it is told by the name of its group."""
    script = """if True:
        import sys, time
        from pathlib import Path
        name, out = sys.argv[1], Path(sys.argv[3])
        (out / f"{name}.json").write_text('{"figures": [1]}')
        print("measured")
        if name == "llama":
            time.sleep(600)
        sys.exit({"opt": 1, "attention": 3}.get(name, 0))
    """
    (tmp_path / "sections.py").write_text(script)
    launcher = module("run")
    monkeypatch.setattr(launcher, "HERE", tmp_path)
    return launcher


def test_a_group_is_ended_at_its_limit_and_keeps_what_it_measured(run, tmp_path):
    outcome = run.run_group(run.Group("llama", 0, 3), 100, tmp_path, is_smoke=False)
    assert outcome.outcome == "ended at its limit"
    assert figures_of(tmp_path, "llama") == [1]
    assert "measured" in (tmp_path / "llama.log").read_text()


def test_what_remains_of_the_budget_is_a_limit_and_decides_what_is_skipped(run, tmp_path, capsys):
    assert run.run_group(run.Group("accuracy", 20, 40), 19, tmp_path, is_smoke=False).outcome == "skipped"
    assert not (tmp_path / "accuracy.json").exists()
    assert "19 are left" in capsys.readouterr().out
    assert run.run_group(run.Group("accuracy", 20, 40), 21, tmp_path, is_smoke=False).limit_s == 21


def test_the_outcome_of_a_group_is_told(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "GROUPS", tuple(run.Group(name, 0, 60) for name in ("attention", "opt", "tiles")))
    monkeypatch.setattr(sys, "argv", ["run.py", "--out", str(tmp_path / "out"), "--pack", str(tmp_path / "all.tgz")])
    with pytest.raises(SystemExit) as end:
        run.main()
    assert end.value.code == 1
    groups = json.loads((tmp_path / "out/groups.json").read_text())["groups"]
    assert [group["outcome"] for group in groups] == ["device failed", "failed", "complete"]
    assert "not complete: attention device failed, opt failed" in capsys.readouterr().out
    assert (tmp_path / "all.tgz").exists()


def test_a_section_keeps_its_figures_when_it_fails(module, tmp_path):
    sections, setting = module("sections"), module("setting")
    report = sections.Report(tmp_path, setting.for_smoke())

    def measured():
        yield [1]
        yield [1, 2]
        raise RuntimeError("out of luck")

    report.section("some", measured())
    assert report.failed == ["some"]
    content = json.loads((tmp_path / "some.json").read_text())
    assert content["figures"] == [1, 2]
    assert not content["is_complete"]
    assert "out of luck" in content["failure"]


def test_the_summary_names_what_was_predicted(module, tmp_path):
    decode = [{"batch": 1, "over_floor": 1.5, "device_over_floor": None}]
    (tmp_path / "llama.json").write_text(json.dumps({"figures": {"decode": decode}}))
    lines = module("summary").summarize(tmp_path)
    assert len(lines) == 1
    assert all(part in lines[0] for part in ("decode of 1", "1.50", "predicted 1.45", "target <= 1.25"))


def test_the_kernels_tests_are_found_without_pytest_asyncio():
    """A machine with a GPU may have no more than pytest itself."""
    command = [sys.executable, "-m", "pytest", "-p", "no:asyncio", "--collect-only", "-q", "-m", "gpu"]
    process = subprocess.run(
        [*command, "tests/engine/attention/test_triton.py"], cwd=ROOT, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-2000:]
