"""Profiles from published tables: what a table must have, and what the times are made of."""

import csv
import json
from pathlib import Path

import pytest
from google.protobuf import json_format

from lemix.internal.v1 import profile_pb2
from services.model_shape import ModelShape
from services.profile_artifact import read_artifact
from services.profiler.vidur.__main__ import main
from services.profiler.vidur.devices import DEVICES
from services.profiler.vidur.stage_times import StageTimes, Tables
from services.profiler.vidur.tables import (
    ELEMENTWISE,
    EMBEDDING,
    MATMULS,
    Curve,
    Spread,
    TableError,
    read_attention,
    read_mlp,
    read_send_recv,
)

ROOT = Path(__file__).resolve().parents[3]
SHAPE = ModelShape(num_layers=4, hidden=256, intermediate=512, kv_hidden=256, vocab_size=1024)
OPERATIONS = sorted({*MATMULS, *ELEMENTWISE, EMBEDDING})


def write(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return path


def mlp_row(tokens, ms=0.001, workers=1, **changed):
    """Every operation takes `ms` per token at least, in the middle twice and at most three times as much."""
    row = {"n_embd": 256, "n_expanded_embd": 512, "num_tokens": tokens, "num_tensor_parallel_workers": workers}
    for name in OPERATIONS:
        for factor, part in enumerate(("min", "median", "max"), start=1):
            row[f"{name}.{part}"] = ms * tokens * factor
    return row | changed


def attention_ms(length, cached):
    return 0.02 + 1e-4 * length + 2e-7 * length * length + 3e-7 * length * cached


ATTENTION = [
    {"phase": "prefill", "batch_size": 1, "prefill_chunk_size": length, "kv_cache_size": cached,
     "attn_ms_median": attention_ms(length, cached)}
    for length in (128, 512, 1024, 2048) for cached in (0, 512, 2048)
] + [
    {"phase": "decode", "batch_size": batch, "prefill_chunk_size": 0, "kv_cache_size": 1024,
     "attn_ms_median": 0.01 + 2e-5 * batch * 1024}
    for batch in (1, 8, 64)
]  # fmt: skip
SEND_RECV = [
    {"send_recv.min": 0.01, "send_recv.median": size * 1e-8, "send_recv.max": 10.0, "size": size,
     "devices_per_node": devices}
    for size in (1_000_000, 2_000_000) for devices in (1, 2)
]  # fmt: skip


@pytest.fixture
def files(tmp_path):
    rows = [mlp_row(tokens) for tokens in (1, 64, 1024)] + [mlp_row(1, ms=9.0, workers=2)]
    config = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4,
              "vocab_size": 1024}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    return {
        "mlp": write(tmp_path / "mlp.csv", rows),
        "attention": write(tmp_path / "attention.csv", ATTENTION),
        "send-recv": write(tmp_path / "send_recv.csv", SEND_RECV),
        "config": tmp_path / "config.json",
        "output": tmp_path / "profile.json",
    }


def run(files, *more):
    arguments = [word for name, path in files.items() for word in (f"--{name}", str(path))]
    return main([*arguments, "--model", "small", "--name", "gpu-small", "--date", "2026-01-02", *more])


def stage_times(files, stage, *, num_stages=2, device="a100"):
    tables = Tables(
        read_mlp(files["mlp"], 256, 512), read_attention(files["attention"], 256), read_send_recv(files["send-recv"])
    )
    return StageTimes(SHAPE, tables, stage, num_stages, DEVICES["a100"], DEVICES[device])


def test_a_curve_is_straight_between_sizes_and_in_proportion_beyond():
    curve = Curve((10, 20), (Spread(1.0, 2.0, 3.0), Spread(2.0, 3.0, 5.0)))
    assert curve.at(5) == Spread(1.0, 2.0, 3.0)
    assert curve.at(15) == Spread(1.5, 2.5, 4.0)
    assert curve.at(40) == Spread(4.0, 6.0, 10.0)


def test_tables_are_read_in_seconds_for_one_gpu(files):
    mlp = read_mlp(files["mlp"], 256, 512)
    assert mlp["mlp_up_proj"].at(64).median == pytest.approx(0.128e-3)
    assert mlp["mlp_up_proj"].at(1).median == pytest.approx(2e-6)  # not the row of two workers
    assert read_send_recv(files["send-recv"]).at(1_500_000).median == pytest.approx(15e-6)
    attention = read_attention(files["attention"], 256)
    assert attention.prefill_s(1, 700, 300) == pytest.approx(attention_ms(700, 300) * 1e-3, rel=1e-3)
    assert attention.decode_s(4, 512) == pytest.approx((0.01 + 2e-5 * 4 * 512) * 1e-3, rel=1e-3)
    assert attention.prefill_error < 1e-3


def test_attention_is_read_from_vidurs_own_columns_too(files, tmp_path):
    rows = [
        {
            "is_prefill": row["phase"] == "prefill",
            "attn_prefill.median": row["attn_ms_median"] if row["phase"] == "prefill" else "",
            "attn_decode.median": row["attn_ms_median"] if row["phase"] == "decode" else "",
            **{name: row[name] for name in ("batch_size", "prefill_chunk_size", "kv_cache_size")},
            "n_embd": 256,
            "num_tensor_parallel_workers": 1,
        }
        for row in ATTENTION
    ]
    other = rows[0] | {"num_tensor_parallel_workers": 2, "attn_prefill.median": 1e6}
    assert read_attention(write(tmp_path / "own.csv", [*rows, other]), 256) == read_attention(files["attention"], 256)


def test_a_stage_takes_its_layers_and_its_end_of_the_model(files):
    first, last = stage_times(files, 0), stage_times(files, 1)
    layer_s = (len(MATMULS) + len(ELEMENTWISE)) * 2e-6 * 64 + attention_ms(64, 0) * 1e-3
    embedding_s = 2e-6 * 64
    head_s = 2e-6  # of one logit; the head has as many columns as the up projections
    sent_s = 10e-6  # the table's smallest size
    assert first.prefill(1, 64).median == pytest.approx(2 * layer_s + embedding_s + sent_s, rel=1e-3)
    assert last.prefill(1, 64).median == pytest.approx(2 * layer_s + head_s, rel=1e-3)
    backward_s = 2.0 * (2 * layer_s + 64 * head_s) + sent_s
    assert last.train_backward(1, 64).median == pytest.approx(backward_s, rel=1e-3)


def test_requests_that_decode_with_a_prompt_share_its_matrix_products(files):
    write(files["mlp"], [mlp_row(tokens, ms=0.1 / tokens) for tokens in (1, 1024)])  # reading the weights takes it all
    times = stage_times(files, 1)
    together = times.prefill(1, 64, decodes=8, decode_length=100)
    assert together.median < times.prefill(1, 64).median + times.decode(8, 100).median
    assert together.median > times.prefill(1, 64).median


def test_a_faster_gpu_is_faster_by_what_bounds_each_part(files):
    slow, fast = stage_times(files, 1), stage_times(files, 1, device="h100")
    memory = DEVICES["a100"].memory_bytes_per_s / DEVICES["h100"].memory_bytes_per_s
    compute = DEVICES["a100"].flops_per_s / DEVICES["h100"].flops_per_s
    assert fast.decode(1, 1024).median == pytest.approx(slow.decode(1, 1024).median * memory, rel=1e-6)
    assert compute < fast.prefill(8, 1024).median / slow.prefill(8, 1024).median < memory
    assert fast.optimizer_step_s() == pytest.approx(slow.optimizer_step_s() * memory)


def test_parameters_and_bytes_are_those_of_llama_2_7b():
    shape = ModelShape(num_layers=32, hidden=4096, intermediate=11008, kv_hidden=4096, vocab_size=32000)
    assert sum(shape.stage_parameters(stage, 3) for stage in range(3)) == 6_738_415_616 - 4096  # less the last norm
    assert shape.kv_bytes_per_token(32) == 512 * 1024


def test_a_key_that_is_null_has_its_default():
    config = {"num_hidden_layers": 4, "hidden_size": 256, "num_attention_heads": 4, "vocab_size": 1024}
    unset = dict.fromkeys(("num_key_value_heads", "head_dim", "intermediate_size"))
    assert ModelShape.from_config(config | unset) == ModelShape(4, 256, 1024, 256, 1024)
    with pytest.raises(ValueError, match="vocab_size must be a whole number from 1 on, not None"):
        ModelShape.from_config(config | {"vocab_size": None})


def test_the_command_writes_an_artifact(files, capsys):
    assert run(files) == 0
    profile = json_format.Parse(files["output"].read_text(), profile_pb2.Profile())
    assert (profile.fingerprint, profile.num_stages, profile.model) == ("gpu-small", 2, "small")
    assert profile.created_unix_s == 1767312000
    assert profile.source.startswith("derived from kernel times of A100 80GB SXM published with Vidur")
    chosen = {(fit.stage, fit.op) for fit in profile.fits if fit.chosen}
    ops = (
        profile_pb2.OP_KIND_PREFILL,
        profile_pb2.OP_KIND_DECODE,
        profile_pb2.OP_KIND_TRAIN_FORWARD,
        profile_pb2.OP_KIND_TRAIN_BACKWARD,
        profile_pb2.OP_KIND_OPTIMIZER_STEP,
        profile_pb2.OP_KIND_WEIGHT_SYNC,
    )
    assert chosen == {(stage, op) for stage in range(2) for op in ops}
    assert "of the roofline" in capsys.readouterr().out


def lacks_columns(files):
    rows = [{k: v for k, v in mlp_row(1).items() if k not in ("mlp_act.median", "num_tokens")}]
    write(files["mlp"], rows)
    return r"mlp\.csv: lacks the columns num_tokens, mlp_act\.median"


def lacks_times(files):
    write(files["attention"], [{"batch_size": 1, "prefill_chunk_size": 1, "kv_cache_size": 0}])
    return r"attention\.csv: lacks the columns is_prefill, attn_prefill\.median, attn_decode\.median"


def has_no_number(files):
    write(files["mlp"], [mlp_row(1), mlp_row(2, **{"emb.median": "nan"})])
    return r"mlp\.csv: line 3, column emb\.median: 'nan' is not a number"


def has_falling_times(files):
    write(files["mlp"], [mlp_row(1, **{"emb.min": 5.0})])
    return r"mlp\.csv: line 2, columns emb: min, median and max must rise from 0 on"


def is_of_another_model(files):
    write(files["mlp"], [mlp_row(1, n_embd=512)])
    return r"mlp\.csv: line 2: is of a model of widths \(512\.0, 512\.0\), not \(256, 512\)"


def has_no_decode(files):
    write(files["attention"], ATTENTION[:-3])
    return r"attention\.csv: has no row of decode on one GPU"


def has_attention_of_two_gpus_alone(files):
    write(files["attention"], [row | {"num_tensor_parallel_workers": 2} for row in ATTENTION])
    return r"attention\.csv: has no row of prefill on one GPU"


def has_attention_of_another_model(files):
    write(files["attention"], [row | {"n_embd": 8192} for row in ATTENTION])
    return r"attention\.csv: line 2: is of a model of width 8192, not 256"


def has_one_size(files):
    write(files["attention"], [ATTENTION[0], *ATTENTION[-3:]])
    return r"attention\.csv: the sizes in the 1 rows of prefill are too few to fit their times"


def is_between_machines(files):
    write(files["send-recv"], [row | {"devices_per_node": 1} for row in SEND_RECV])
    return r"send_recv\.csv: has no row with devices_per_node above 1"


def is_missing(files):
    files["mlp"].unlink()
    return r"mlp\.csv: No such file"


def has_no_model(files):
    files["config"].write_text('{"hidden_size": 256}')
    return r"config\.json: not a model configuration: num_attention_heads must be a whole number from 1 on, not None"


@pytest.mark.parametrize(
    "spoil",
    [
        lacks_columns, lacks_times, has_no_number, has_falling_times, is_of_another_model, has_no_decode, has_one_size,
        has_attention_of_two_gpus_alone, has_attention_of_another_model,
        is_between_machines, is_missing, has_no_model,
    ],
    ids=lambda spoil: spoil.__name__,
)  # fmt: skip
def test_a_table_that_cannot_be_used_is_named(files, capsys, spoil):
    told = spoil(files)
    assert run(files) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    with pytest.raises(TableError, match=told):
        raise TableError(error)
    assert not files["output"].exists()


@pytest.mark.parametrize("path", sorted((ROOT / "deploy" / "profiles").glob("*.json")), ids=lambda path: path.stem)
def test_the_profiles_that_come_along_are_whole_and_name_their_source(path):
    profile = read_artifact(path.read_text())
    assert profile.content_hash
    assert (profile.fingerprint, profile.model) == (path.stem, "llama-2-7b")
    assert "Vidur (Agrawal et al., MLSys 2024, MIT licence)" in profile.source
    assert len(profile.host_links) == len(profile.mixed) == len(profile.memory) == profile.num_stages
    weights = sum(stage.weight_bytes for stage in profile.memory)
    assert weights == pytest.approx(2 * 6.738e9, rel=1e-3)
