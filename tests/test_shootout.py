"""The shootout: what a row holds, settings from a file, stopping and going on, the same rows on a cluster, shipped rows."""

import json
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from labsupport.cli import app
from labsupport.evidence import farm, measurements, shootout, sweep
from labsupport.evidence.job import Job
from labsupport.model import evaluate, models, text
from labsupport.pipeline.quantize import quantize_model
from labsupport.quant import rtn

LENGTH = 64
FLOAT = {"planted": None, "method": "float"}
SETTINGS = [
    FLOAT,
    {"planted": None, "method": "rtn", "bits": 3, "group_size": 32},
    {"planted": 8, "method": "rtn", "bits": 3, "group_size": "row", "embedding": 8},
    {"planted": None, "method": "awq", "base": "gptq", "bits": 4, "group_size": 32, "samples": 2, "embedding": 4},
]
CODE = "def load_settings(path_to_file):\n    settings = read(path_to_file)\n    return settings, path_to_file\n\n\n"


@pytest.fixture(scope="module")
def stream():
    ids = torch.randint(0, 300, (640,), generator=torch.Generator().manual_seed(0))
    return text.TokenStream(ids, torch.arange(640) // 128, tuple("abcde"), 2000, "digest", "made up")


def calibration(domain, samples):
    return torch.randint(0, 300, (samples, LENGTH), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def measured(tiny, stream, tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "shootout.json"
    return sweep.run("shootout", tiny, stream, path, "tiny", None, LENGTH, calibration, settings=SETTINGS)


def test_a_row_is_what_its_parts_give(tiny, stream, measured):
    row = measured.rows[1]
    quantized, report = quantize_model(tiny, "rtn", bits=3, group_size=32)
    before, after = (evaluate.evaluate(model, stream, LENGTH) for model in (tiny, quantized))
    kl, agreement = evaluate.divergence(tiny, quantized, stream, LENGTH)
    assert row["perplexity"] == pytest.approx(after.perplexity, rel=1e-6)  # float32 sums of 300 exponentials in another order
    assert row["loss"] == pytest.approx(after.loss.tolist(), abs=1e-3)
    assert row["kl_mean"] == pytest.approx(kl, rel=1e-5)
    assert row["agreement"] == agreement
    assert row["kl_mean"] == pytest.approx(sum(row["kl_by_document"]) / sum(measured.about["tokens"]), abs=1e-6)
    assert row["agreement"] == sum(row["agreed_by_document"]) / sum(measured.about["tokens"])
    assert row["kl_median"] < row["kl_mean"] < row["kl_p999"]
    pair = evaluate.paired_bootstrap(before, after, level=evaluate.covering_level(before.tokens))
    for key in ("change", "low", "high"):
        assert row[key] == pytest.approx(getattr(pair, key), abs=1e-6)
    assert measured.paired(measured.rows[0], row).low == pytest.approx(row["low"], abs=1e-5)  # of losses that are rounded
    assert (row["identifiers"], row["copies"], row["parses"]) == (None, None, None)  # no tokenizer was given
    assert (row["linear_nbytes"], row["bits_per_weight"]) == (report.nbytes, report.bits_per_weight)
    assert set(row["versions"]) == {"python", "torch", "transformers", "labsupport"}
    assert sweep.setting_of(row) == SETTINGS[1]


def test_bytes_are_those_of_the_whole_model(tiny, measured):
    embedding = tiny.get_input_embeddings().weight
    blocks = sum(layer.weight.numel() for layer in models.linears(tiny).values())
    norms = sum(parameter.numel() for parameter in tiny.parameters() if parameter.ndim == 1)
    whole, rounded, both, by_awq = measured.rows
    assert tiny.num_parameters() == blocks + norms + embedding.numel()
    assert whole["nbytes"] == 2 * tiny.num_parameters()
    assert rounded["nbytes"] == rounded["linear_nbytes"] + 2 * (norms + embedding.numel())
    for row, bits in ((both, 8), (by_awq, 4)):
        stored = rtn.quantize(embedding.detach(), bits=bits, group_size=32).nbytes
        assert row["nbytes"] == row["linear_nbytes"] + 2 * norms + stored
    assert whole["change"] == whole["kl_mean"] == 0
    assert whole["agreement"] == 1


def test_rounded_embeddings_are_rounded_once_and_a_head_of_its_own_too(tiny):
    from transformers import LlamaForCausalLM

    before = tiny.get_input_embeddings().weight.detach().clone()
    stored = rtn.quantize(before, bits=4, group_size=32)
    tied = models.duplicate(tiny)
    assert shootout.round_embedding(tied, 4) == 2 * before.numel() - stored.nbytes
    assert tied.get_output_embeddings().weight is tied.get_input_embeddings().weight
    assert torch.equal(tied.get_input_embeddings().weight, stored.dequantize())
    assert torch.equal(tiny.get_input_embeddings().weight, before)
    config = type(tiny.config)(**{**tiny.config.to_dict(), "tie_word_embeddings": False})
    two = LlamaForCausalLM(config).eval()
    head = rtn.quantize(two.get_output_embeddings().weight.detach().clone(), bits=4, group_size=32)
    assert shootout.round_embedding(two, 4) == 2 * (2 * before.numel() - stored.nbytes)
    assert torch.equal(two.get_output_embeddings().weight, head.dequantize())


def test_planted_outliers_do_not_change_the_float_model(tiny, stream, tmp_path):
    settings = [FLOAT | {"planted": 8}]
    row = sweep.run("shootout", tiny, stream, tmp_path / "rows.json", "tiny", None, LENGTH, settings=settings).rows[0]
    assert row["kl_mean"] < 1e-6  # float32 rounding of a product and a quotient in each norm
    assert abs(row["change"]) < 1e-4


def test_only_missing_rows_are_measured_and_a_file_of_other_items_is_refused(tmp_path):
    path, wanted, asked = tmp_path / "rows.json", [{"bits": bits} for bits in (4, 3, 2)], []

    def measure(missing):
        asked.append(list(missing))
        return ({**setting, "seconds": float(len(asked))} for setting in reversed(missing))

    about = {"items": {"copies": [1]}}
    sweep.collect(path, about, [wanted[1]], measure)
    measured = sweep.collect(path, about, wanted, measure)
    assert asked == [[wanted[1]], [wanted[0], wanted[2]]]
    assert [(row["bits"], row["seconds"]) for row in measured.rows] == [(4, 2.0), (3, 1.0), (2, 2.0)]
    with pytest.raises(ValueError, match="rows measured with another items"):
        sweep.collect(path, {"items": {"copies": [2]}}, wanted, measure)


def test_items_are_packed_into_digits():
    items = [True, False, False, True, True, False]
    assert shootout.pack(items) == "98"
    assert shootout.unpack("98", 6) == items
    assert shootout.pack([]) == ""
    for count in range(1, 20):
        items = torch.rand(count, generator=torch.Generator().manual_seed(count)).gt(0.5).tolist()
        assert shootout.unpack(shootout.pack(items), count) == items


def test_metrics_are_paired_by_document_within_a_file_and_across_two(measured):
    whole, rounded = measured.rows[:2]
    for metric, key in (("kl_mean", "kl_mean"), ("agreement", "agreement")):
        found = measured.difference(whole, rounded, metric)
        assert found.change == pytest.approx(rounded[key] - whole[key], abs=1e-6)
        assert found.low <= found.change <= found.high
    items = {"identifiers": [2, 0, 3, 0, 1], "copies": [0] * 5, "parses": [4, 0, 0, 0, 0]}
    about = measured.about | {"items": items}
    one = whole | {"done": {"identifiers": shootout.pack([True, False, True, False, False, True]), "parses": "0"}}
    two = whole | {"done": {"identifiers": shootout.pack([True] * 6), "parses": "f"}}
    sums, counts = shootout.by_document(about, one, "identifiers")
    assert (sums.tolist(), counts.tolist()) == ([1, 0, 1, 0, 1], items["identifiers"])
    files = sweep.Measurements(about, [one]), sweep.Measurements(about, [two])
    found = files[0].difference(one, two, "identifiers", files[1])
    assert found.change == pytest.approx(0.5)
    assert files[0].paired(one, rounded, files[1]) == measured.paired(whole, rounded)
    with pytest.raises(ValueError, match="metric is 'copies', wanted one of loss, kl_mean, agreement, identifiers, parses"):
        files[0].difference(one, two, "copies")
    larger = sweep.Measurements(about | {"model_sha256": "larger"}, [two])
    assert files[0].difference(one, two, "identifiers", larger).change == pytest.approx(0.5)
    with pytest.raises(ValueError, match="kl_mean is against the float model of each file, and these are two"):
        files[0].difference(one, two, "kl_mean", larger)
    other = sweep.Measurements(about | {"text_sha256": "another"}, [two])
    for compare in (lambda: files[0].difference(one, two, "agreement", other), lambda: files[0].paired(one, two, other)):
        with pytest.raises(ValueError, match="so they cannot be paired"):
            compare()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is neither JSON nor YAML"),
        ("{}", "holds dict, wanted a list of settings"),
        ("[]", "wanted a list of settings"),
        ("- rtn", "a configuration is 'rtn', wanted a mapping with a method"),
        ("- {method: magic}", "method is 'magic', wanted one of rtn, nf4"),
        ("- {method: rtn, bit: 4}", "bit is given, but rtn takes bits"),
        ("- {method: gptq, bits: 4}", "samples is missing in"),
        ("- {method: rtn, bits: 4, samples: 3}", "samples is given in"),
        ("- {method: float, bits: 4}", "bits is given, but float takes no settings but embedding"),
        ("- {method: rtn, bits: 4, embedding: 16}", "embedding is 16, wanted a whole number from 2 to 8"),
        ("- {method: rtn, bits: 4}\n- {bits: 4, method: rtn}", "twice"),
    ],
)
def test_settings_from_a_file(tmp_path, content, message):
    path = tmp_path / "settings.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        shootout.read_settings(path)


def test_settings_of_a_file_are_taken(tmp_path):
    path = tmp_path / "settings.json"
    path.write_text(json.dumps([{"method": "rtn", "bits": 4}, {"method": "nf4", "absmax": "double", "planted": 8}]))
    assert shootout.read_settings(path) == [
        {"planted": None, "method": "rtn", "bits": 4},
        {"planted": 8, "method": "nf4", "absmax": "double"},
    ]


@pytest.mark.parametrize("grid", [shootout.settings, shootout.settings_short])
def test_every_setting_of_the_grids_is_one_that_can_be_made(course, grid):
    settings = list(grid(course[0]))
    assert len({json.dumps(setting, sort_keys=True) for setting in settings}) == len(settings)
    for setting in settings:
        assert shootout.check(setting) is setting
    assert len(settings) >= (60 if grid is shootout.settings else 12)


def test_the_command_takes_own_settings_only_into_an_own_file(tmp_path):
    (tmp_path / "settings.yaml").write_text("- {method: float}")
    for arguments in (["shootout"], ["rtn", "--out", str(tmp_path / "x.json")]):
        done = CliRunner().invoke(app, ["sweep", *arguments, "--configs", str(tmp_path / "settings.yaml")])
        assert done.exit_code == 1
        assert "--configs is for the shootout, with --out" in done.output


# A cluster. Its workers load a small model and a text of Python files by their paths.


@pytest.fixture(scope="module")
def job(course, tmp_path_factory):
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("job")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    course[1].save_pretrained(folder / "model")
    for split, count in (("train", 8), ("heldout", 3)):
        (folder / "text" / split).mkdir(parents=True)
        for number in range(count):
            (folder / "text" / split / f"{split}{number}.py").write_text(CODE * 20)
    return Job("shootout", str(folder / "model"), str(folder / "text"), windows=3, length=256)


@pytest.fixture(scope="module")
def own_settings():
    return [*SETTINGS[:3], SETTINGS[3] | {"samples": 1}]


@pytest.fixture(scope="module")
def alone(job, own_settings, tmp_path_factory):
    """The rows of one process."""
    return job.open().run(tmp_path_factory.mktemp("alone") / "rows.json", settings=own_settings)


def without_times(rows):
    return [{key: value for key, value in row.items() if key not in ("seconds", "quantizing")} for row in rows]


@pytest.mark.slow
def test_two_workers_give_the_rows_of_one_process_and_a_stopped_sweep_goes_on(job, own_settings, alone, tmp_path):
    from distributed import LocalCluster

    path = tmp_path / "rows.json"

    class Stop(Exception):
        pass

    def stop(done, total):
        if done == 2:
            raise Stop

    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, silence_logs=50) as cluster:
        with pytest.raises(Stop):
            farm.run(job, path, cluster.scheduler_address, own_settings, stop)
        about, rows = measurements.read(path)
        assert len(rows) == 2
        kept = [sweep.setting_of(row) for row in rows]
        measurements.write(path, about, [row | {"seconds": -1.0} for row in rows])  # a row that is there is kept
        measured = farm.run(job, path, cluster.scheduler_address, own_settings)
    assert [row["seconds"] == -1.0 for row in measured.rows] == [setting in kept for setting in own_settings]
    assert without_times(measured.rows) == without_times(alone.rows)
    assert measured.about == alone.about
    assert measurements.read(path)[1] == measured.rows


def test_a_worker_in_this_process_measures_the_same(job, own_settings, alone, tmp_path):
    from distributed import LocalCluster

    seen = []
    with LocalCluster(
        n_workers=1, threads_per_worker=2, processes=False, dashboard_address=None, protocol="inproc", silence_logs=50
    ) as cluster:
        measured = farm.run(
            job, tmp_path / "rows.json", cluster.scheduler_address, own_settings[:2], lambda *counts: seen.append(counts)
        )
        with pytest.raises(ValueError, match="rows measured with another text_sha256"):
            _with_another_text(job, tmp_path / "rows.json", cluster.scheduler_address)
    assert without_times(measured.rows) == without_times(alone.rows[:2])
    assert seen == [(0, 2), (1, 2), (2, 2)]
    assert measured.rows[0]["identifiers"] is not None


def _with_another_text(job, path, address):
    from dataclasses import replace

    farm.run(replace(job, source=str(models.data_dir().parent / "labsupport" / "quant"), windows=3), path, address, [])


@pytest.mark.parametrize("name", ["lora", "sink"])
def test_rows_that_build_on_each_other_are_not_shared_out(tmp_path, name):
    with pytest.raises(ValueError, match=f"the rows of the sweep '{name}' are made one after the other: leave the cluster out"):
        farm.run(Job(name), tmp_path / "rows.json", "tcp://127.0.0.1:1")


def test_no_scheduler_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(farm, "WAIT", 0.2)
    done = CliRunner().invoke(app, ["sweep", "shootout", "--dask", "tcp://127.0.0.1:1", "--out", str(tmp_path / "rows.json")])
    assert done.exit_code == 1
    assert "labs sweep: no Dask scheduler answers at 'tcp://127.0.0.1:1'" in done.output
    assert "Traceback" not in done.output


def test_workers_that_measure_something_else_are_noticed(tmp_path, monkeypatch):
    about = {"model_sha256": "one", "tokens": []}
    answers = iter([(about, SETTINGS[:2]), (about, {**SETTINGS[0], "seconds": 1.0}), ({"model_sha256": "two"}, {**SETTINGS[1]})])
    client = _client(answers)
    monkeypatch.setattr("distributed.Client", lambda *_, **__: client)
    monkeypatch.setattr("distributed.as_completed", lambda tasks: iter(tasks))
    with pytest.raises(ValueError, match="two workers measure with another model_sha256"):
        farm.run(Job("shootout"), tmp_path / "rows.json", "tcp://there")
    assert len(measurements.read(tmp_path / "rows.json")[1]) == 1  # the row that was right is kept


def _client(answers):
    from contextlib import nullcontext

    submitted = SimpleNamespace(result=lambda: next(answers))
    return nullcontext_with(nullcontext(), wait_for_workers=lambda *_, **__: None, submit=lambda *_, **__: submitted)


def nullcontext_with(context, **methods):
    for name, method in methods.items():
        setattr(context, name, method)
    context.__class__ = type("Client", (type(context),), {"__enter__": lambda self: self})
    return context


# Rows that are shipped.


def test_shipped_rows_are_enough_and_say_what_they_are_of():
    course = sweep.load("shootout")
    assert len(course.rows) >= 60
    assert sum(row["seconds"] for row in course.rows) < 2 * 30 * 60  # of one core: half an hour on two
    for row in course.rows:
        assert {"nbytes", "kl_p999", "identifiers", "copies", "parses", "versions"} <= set(row)
        for metric in shootout.METRICS:
            sums, counts = shootout.by_document(course.about, row, metric)
            if metric != "loss":
                assert sums.sum() / counts.sum() == pytest.approx(row[metric], abs=1e-5)
    whole = course.find(planted=None, method="float", embedding=None)
    worst = course.find(planted=None, method="rtn", bits=2, group_size="row")
    assert course.difference(whole, worst, "identifiers").high < 0
    assert course.paired(whole, worst).change == pytest.approx(worst["change"], abs=1e-5)


def test_shipped_rows_pair_with_those_of_learning_on_the_grid():
    course, learned = sweep.load("shootout"), sweep.load("qat")
    setting = {"method": "rtn", "bits": 4, "group_size": 128}
    here = course.find(planted=None, symmetric=None, embedding=None, **setting)
    there = learned.find(further=None, **setting)
    assert course.paired(here, there, learned).change == pytest.approx(0, abs=1e-5)  # of losses kept to 1e-4 nats a document


def test_both_course_models_are_paired_document_by_document():
    large, small = sweep.load("shootout"), sweep.load("shootout", "course-model-small")
    whole = [measured.find(planted=None, method="float", embedding=None) for measured in (large, small)]
    found = large.paired(*whole, small)
    assert found.low < found.change < found.high
    assert found.change == pytest.approx(small.baseline / large.baseline - 1, abs=1e-5)
    assert large.difference(*whole, "identifiers", small).change == pytest.approx(
        whole[1]["identifiers"] - whole[0]["identifiers"], abs=1e-9
    )
    assert {small.about[key] == large.about[key] for key in ("text_sha256", "tokens", "items", "windows")} == {True}
    # At equal bytes: the large model in 4 bits with a rounded embedding takes what the small one takes in float.
    near = large.find(planted=None, method="rtn", bits=4, embedding=4)
    assert near["nbytes"] == pytest.approx(whole[1]["nbytes"], rel=0.01)
