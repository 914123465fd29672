"""Streaming safetensors files, means of replicas, and their way over the wire."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from lemix.errors import LemixError
from lemix.internal.v1 import node_agent_service_pb2 as node_pb2
from services.node_agent import combine, peer_weights
from services.node_agent.combine import Replica, write_copy, write_mean
from services.node_agent.tensor_file import TensorFile, read_header, write_tensors


def _replica(path: Path, name: str, tensors: dict[str, np.ndarray]) -> Replica:
    save_file(tensors, path / f"{name}.safetensors")
    return Replica(name, [TensorFile.open(path / f"{name}.safetensors")])


def test_the_library_reads_what_is_written_and_the_other_way_round(tmp_path: Path) -> None:
    tensors = {
        "b.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
        "a.bias": np.array([1.5, -2.5], dtype=np.float16),
        "scalar": np.array(3.25, dtype=np.float64),
        "empty": np.zeros((0, 4), dtype=np.float32),
    }
    source = _replica(tmp_path, "one", tensors)
    write_copy(tmp_path / "copy.safetensors", source)
    copied = load_file(tmp_path / "copy.safetensors")
    assert copied.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert copied[name].dtype == tensor.dtype
        np.testing.assert_array_equal(copied[name], tensor)


def test_parts_of_tensors(tmp_path: Path) -> None:
    save_file({"a": np.arange(4, dtype=np.float32)}, tmp_path / "f")
    with TensorFile.open(tmp_path / "f") as file:
        (tmp_path / "f").unlink()
        assert np.frombuffer(file.read("a", 4, 8), "<f4").tolist() == [1.0, 2.0]
        assert np.frombuffer(file.read("a", 12, 100), "<f4").tolist() == [3.0]


@pytest.mark.parametrize("content", [b"", b"short", b"\xff" * 20, b"\x02\0\0\0\0\0\0\0[]", b"\x01\0\0\0\0\0\0\0x"])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "f").write_bytes(content)
    with pytest.raises(ValueError):  # noqa: PT011  several kinds of damage
        read_header(tmp_path / "f")


def test_a_cut_off_file_is_refused(tmp_path: Path) -> None:
    save_file({"a": np.arange(4, dtype=np.float32)}, tmp_path / "f")
    whole = (tmp_path / "f").read_bytes()
    (tmp_path / "f").write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="cut off: a ends at byte"):
        TensorFile.open(tmp_path / "f")


def test_an_incomplete_tensor_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a has 4 bytes instead of 8"):
        write_tensors(tmp_path / "f", [("a", "F32", (2,))], lambda _: iter([b"1234"]))
    assert list(tmp_path.iterdir()) == []


@given(
    st.lists(st.lists(st.floats(-1e3, 1e3, width=32), min_size=5, max_size=5), min_size=1, max_size=4),
    st.sampled_from([np.float64, np.float32, np.float16]),
)
def test_mean_equals_numpy_in_any_order(tmp_path_factory: pytest.TempPathFactory, values, dtype) -> None:
    path = tmp_path_factory.mktemp("mean")
    arrays = [np.array(row, dtype=dtype) for row in values]
    replicas = [_replica(path, f"node-{index}", {"w": array}) for index, array in enumerate(arrays)]
    outputs = set()
    for order in itertools.islice(itertools.permutations(replicas), 6):
        write_mean(path / "mean", order)
        outputs.add((path / "mean").read_bytes())
    assert len(outputs) == 1, "the same bits on every participant"
    mean = load_file(path / "mean")["w"]
    wide = np.mean([array.astype(np.float64) for array in arrays], axis=0)
    assert mean.dtype == (np.float64 if dtype is np.float64 else np.float32)
    np.testing.assert_allclose(mean, wide, rtol=1e-6, atol=1e-6)


def test_mean_in_blocks_and_of_bfloat16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(combine, "_BLOCK_ELEMENTS", 3)
    values = np.arange(8, dtype=np.float32)
    for name, array in (("one", values), ("two", values + 1)):
        bits = (array.view(np.uint32) >> 16).astype(np.uint16).tobytes()  # exact: small integers
        write_tensors(tmp_path / name, [("w", "BF16", (2, 4))], lambda _, bits=bits: iter([bits]))
    replicas = [Replica(name, [TensorFile.open(tmp_path / name)]) for name in ("one", "two")]
    write_mean(tmp_path / "mean", replicas)
    np.testing.assert_array_equal(load_file(tmp_path / "mean")["w"], (values + 0.5).reshape(2, 4))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"w": np.zeros(3, np.float32), "x": np.zeros(1, np.float32)}, "x is in the weights of only one of one and"),
        ({"w": np.zeros(4, np.float32)}, "w differs in type or shape"),
        ({"w": np.zeros(3, np.float16)}, "w differs in type or shape"),
    ],
)
def test_different_models_have_no_mean(tmp_path: Path, other: dict[str, np.ndarray], message: str) -> None:
    one = _replica(tmp_path, "one", {"w": np.zeros(3, np.float32)})
    with pytest.raises(ValueError, match=message):
        write_mean(tmp_path / "mean", [one, _replica(tmp_path, "two", other)])


def test_chunks_form_the_same_tensors_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_weights, "_CHUNK_BYTES", 8)
    tensors = {"a": np.arange(5, dtype=np.float32), "none": np.zeros(0, np.float32), "z": np.ones((2, 2), np.float64)}
    replica = _replica(tmp_path, "one", tensors)
    messages = list(peer_weights.chunks(replica, 12.5))
    assert max(len(message.data) for message in messages) == 8
    with (tmp_path / "raw").open("wb") as file:
        writer = peer_weights._ChunkWriter("peer", file)
        for message in messages:
            writer.add(message)
    assert writer.trained_unix_s == 12.5
    with TensorFile(tmp_path / "raw", writer.finish()) as received:
        write_copy(tmp_path / "again", Replica("again", [received]))
    again = load_file(tmp_path / "again")
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(again[name], tensor)


def _chunk(name: str, data: bytes, offset: int = 0, *, elements: int = 2, dtype: str = "F32"):
    return node_pb2.FetchWeightsResponse(name=name, shape=[elements], dtype=dtype, data=data, offset_bytes=offset)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "ended early"),
        ([_chunk("a", b"1234")], "ended early"),
        ([_chunk("a", b"123456789")], "longer than its shape"),
        ([_chunk("a", b"1234", 4)], "out of order"),
        ([_chunk("a", b"1234"), _chunk("b", b"12345678")], "out of order"),
        ([_chunk("a", b"12345678"), _chunk("b", b"12345678"), _chunk("a", b"12345678")], "came twice"),
        ([_chunk("a", b"12345678", dtype="I64")], "type I64"),
    ],
)
def test_chunks_that_do_not_fit_are_refused(tmp_path: Path, messages, reason: str) -> None:
    with (tmp_path / "raw").open("wb") as file:
        writer = peer_weights._ChunkWriter("peer", file)

        def receive() -> None:
            for message in messages:
                writer.add(message)
            writer.finish()

        with pytest.raises(LemixError, match=reason):
            receive()
