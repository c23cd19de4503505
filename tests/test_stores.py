"""Activation stores: what goes in comes out, on disk as in memory, and damage is noticed."""

import contextlib
import importlib
import json
import tempfile
import threading

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from toy_pairs import TOKENIZER, sized_model, sums

import pkt_fast
from pkt_fast import stores
from pkt_fast.errors import OutputError, StoreError
from pkt_fast.ops import backend
from pkt_fast.phases import StorePlace
from pkt_fast.steering import Loader
from pkt_fast.stores import (
    memory_store,
    model_fingerprint,
    open_directory_store,
    prefetched,
    writing_directory_store,
)

COUNTS = [3, 1, 0, 7, 5, 2]
ORDER = [3, 4, 0, 5, 1, 2]
COLUMNS = {"a": (5, torch.float32), "b": (3, torch.bfloat16)}
PRINT = {"source": "x", "data": "y"}


def rows_of(name, example):
    generator = torch.Generator().manual_seed(hash((name == "a", example)) % 1000)
    width, dtype = COLUMNS[name]
    return torch.randn(COUNTS[example], width, generator=generator).to(dtype)


def fill(store):
    for start in range(0, len(ORDER), 2):
        group = ORDER[start : start + 2]
        store.append({name: torch.cat([rows_of(name, i) for i in group]) for name in COLUMNS})


def check(store):
    for name in COLUMNS:
        for picked in ([0], [5, 3], [2], [1, 2, 0, 4], list(range(6))):
            expected = torch.cat([rows_of(name, i) for i in picked])
            assert torch.equal(store.rows(name, picked), expected)


def test_memory():
    store = memory_store(COUNTS, ORDER, COLUMNS)
    fill(store)
    store.check_complete()
    check(store)
    assert store.num_bytes == 18 * (5 * 4 + 3 * 2)
    with pytest.raises(StoreError, match="19 rows appended"):
        store.append({"a": torch.zeros(1, 5)})


@pytest.mark.parametrize("shard_bytes", [1, 50, 64, 10_000])
def test_directory_with_shards_that_cut_examples(tmp_path, monkeypatch, shard_bytes):
    monkeypatch.setattr(stores, "SHARD_BYTES", shard_bytes)
    path = tmp_path / "store"
    with writing_directory_store(path, COUNTS, ORDER, COLUMNS, PRINT) as store:
        fill(store)
        assert not path.exists()
    check(store)
    assert [p.name for p in tmp_path.iterdir()] == ["store"]
    again = open_directory_store(path, PRINT)
    check(again)


def written(tmp_path):
    path = tmp_path / "store"
    with writing_directory_store(path, COUNTS, ORDER, COLUMNS, PRINT) as store:
        fill(store)
    return path


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str
)
def test_shards_are_plain_safetensors_files(tmp_path, dtype):
    """Also for rows that lie apart in memory, written in pieces."""
    values = torch.randn(7, 10).to(dtype)[:, ::2]
    column = stores.ShardedColumn(tmp_path, "c", 7, 5, dtype)
    column.shard_rows = 4
    for piece in values.split([1, 5, 1]):
        column.append(piece)
    shards = [load_file(column.path(shard))["rows"] for shard in range(2)]
    assert [len(shard) for shard in shards] == [4, 3]
    assert torch.equal(torch.cat(shards), values)
    assert column.checksums == [stores.checksum(column.path(shard)) for shard in range(2)]


def test_a_shard_that_cannot_be_written_is_one_line(tmp_path):
    column = stores.ShardedColumn(tmp_path / "gone", "c", 2, 3, torch.float32)
    with pytest.raises(OutputError, match="cannot write"):
        column.append(torch.zeros(2, 3))


def captured(store, value, examples, seed):
    """Fill ``store`` from an activation (B, T, D) whose rows are dropped into place by index."""
    generator = torch.Generator().manual_seed(seed)
    for example in examples:
        index = torch.randperm(value.shape[0] * value.shape[1], generator=generator)
        for name in store.columns:
            store.capture(name, value, index[: store.counts[example]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_captured_from_an_activation(tmp_path, dtype):
    value = torch.randn(2, 7, 6, generator=torch.Generator().manual_seed(1))[..., ::2]
    columns = {"layer2": (3, dtype)}
    memory = memory_store([3, 0, 5], [2, 1, 0], columns)
    captured(memory, value, memory.order, seed=4)
    memory.check_complete()
    with writing_directory_store(tmp_path / "store", [3, 0, 5], [2, 1, 0], columns, PRINT) as store:
        captured(store, value, store.order, seed=4)
    index = torch.randperm(14, generator=torch.Generator().manual_seed(4))[:5]
    assert torch.equal(memory.rows("layer2", [2]), value.reshape(14, 3)[index].to(dtype))
    for example in range(3):
        assert torch.equal(memory.rows("layer2", [example]), store.rows("layer2", [example]))
    with pytest.raises(StoreError, match="9 rows appended, 8 expected"):
        memory.capture("layer2", value, index[:1])


def test_an_interrupted_write_leaves_nothing(tmp_path):

    def interrupted():
        with writing_directory_store(tmp_path / "s", COUNTS, ORDER, COLUMNS, PRINT) as store:
            store.append({name: rows_of(name, 3) for name in COLUMNS})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []
    with (
        pytest.raises(StoreError, match="0 of 18 rows"),
        writing_directory_store(tmp_path / "s", COUNTS, ORDER, COLUMNS, PRINT),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_of_two_that_write_one_store_the_first_to_finish_keeps_it(tmp_path):
    path = tmp_path / "s"
    with writing_directory_store(path, COUNTS, ORDER, COLUMNS, PRINT) as slow:
        with writing_directory_store(path, COUNTS, ORDER, COLUMNS, PRINT) as fast:
            fill(fast)
        inode = path.stat().st_ino
        fill(slow)
    for store in (slow, fast, open_directory_store(path, PRINT)):
        check(store)
    assert path.stat().st_ino == inode
    assert [entry.name for entry in tmp_path.iterdir()] == ["s"]


def test_damage_and_foreign_stores_are_noticed(tmp_path):
    path = written(tmp_path)
    with pytest.raises(StoreError, match="another source"):
        open_directory_store(path, {**PRINT, "source": "z"})
    shard = next(path.glob("a-*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(StoreError, match=r"^store shard .*checksum"):
        open_directory_store(path, PRINT)
    shard.unlink()
    with pytest.raises(StoreError, match="damaged"):
        open_directory_store(path, PRINT)
    (path / "manifest.json").write_text("{")
    with pytest.raises(StoreError, match="damaged"):
        open_directory_store(path, PRINT)
    assert open_directory_store(tmp_path / "none", PRINT) is None


def test_manifest_describes_the_shards(tmp_path):
    manifest = json.loads((written(tmp_path) / "manifest.json").read_text())
    assert manifest["columns"]["b"]["dtype"] == "bfloat16"
    assert manifest["counts"] == COUNTS
    assert manifest["fingerprint"] == PRINT


def test_place_reuses_a_directory_and_spills_when_memory_is_short(tmp_path):
    filled = []

    def counted(store):
        filled.append(1)
        fill(store)

    place = StorePlace(tmp_path, 1e9)
    for _ in range(2):
        check(place.filled("source", COUNTS, ORDER, COLUMNS, PRINT, counted))
    assert len(filled) == 1
    spilled = StorePlace(None, 10).filled("source", COUNTS, ORDER, COLUMNS, PRINT, counted)
    check(spilled)
    directory = spilled.columns["a"].directory
    assert directory.exists()
    del spilled
    assert not directory.exists()


def test_a_temporary_place_is_left_to_nobody(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def broken(store):
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        StorePlace(None, 10).filled("source", COUNTS, ORDER, COLUMNS, PRINT, broken)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    with pytest.raises(OutputError, match="no temporary place for a store"):
        StorePlace(None, 10).filled("source", COUNTS, ORDER, COLUMNS, PRINT, broken)


def test_fingerprint_sees_any_parameter():
    model = torch.nn.Sequential(torch.nn.Linear(9, 70), torch.nn.Linear(70, 2))
    before = model_fingerprint(model)
    assert before == model_fingerprint(model)
    with torch.no_grad():
        model[1].bias[0] += 1e-6
    assert model_fingerprint(model) != before


def test_fingerprint_sees_buffers_and_the_last_element_of_large_weights():
    model = torch.nn.Module()
    model.register_buffer("weight", torch.zeros(4104, 4100, dtype=torch.int8))  # above 2**24
    before = model_fingerprint(model)
    model.weight[-1, -1] = 1
    assert model_fingerprint(model) != before


def test_fingerprint_sees_which_adapter_acts():
    config = LoraConfig(r=2, target_modules=["0"])
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(9, 70)), config)
    model.add_adapter("other", config)
    prints = [model_fingerprint(model)]
    model.set_adapter("other")
    prints.append(model_fingerprint(model))
    with model.disable_adapter():
        prints.append(model_fingerprint(model))
    model.base_model.model[0].set_scale("other", 3.0)
    prints.append(model_fingerprint(model))
    assert len(set(prints)) == 4
    model.set_adapter("default")
    model.base_model.model[0].set_scale("other", 1.0)
    assert model_fingerprint(model) == prints[0]


def test_prefetch_keeps_order_and_passes_errors_on():
    assert list(prefetched(iter(range(20)))) == list(range(20))

    def broken():
        yield 1
        raise ValueError("broken")

    stream = prefetched(broken())
    assert next(stream) == 1
    with pytest.raises(ValueError, match="broken"):
        next(stream)


def test_prefetch_ends_its_thread_when_the_loop_is_left():
    before = threading.active_count()
    stream = prefetched(iter(range(10**9)))
    next(stream)
    stream.close()
    assert threading.active_count() == before


@pytest.mark.parametrize(
    ("preference", "problem", "pinned"),
    [("auto", None, True), ("auto", "no kernel image", False), ("triton", None, False)],
)
def test_memory_is_pinned_where_a_kernel_writes_to_it(preference, problem, pinned, monkeypatch):
    """Elsewhere a capture into it would be refused, or go the long way of the reference."""
    module = importlib.import_module("pkt_fast.ops.capture_rows")
    monkeypatch.setattr(module, "_capture_rows_pinned", lambda *_: None)
    monkeypatch.setattr(module, "cuda_problem", lambda device: problem)
    with backend(preference):
        place = StorePlace.of("memory", 1.0, torch.device("cuda"))
        assert StorePlace.of("memory", 1.0, torch.device("cpu")).pinned_bytes == 0
    assert (place.pinned_bytes > 0) is pinned


# --------------------------------------------------------------------------- every way to transfer

ROWS = sums(3, 3)
WAYS = [
    {"objective": "relation", "interface": "contribution", "output_loss": "kl",
     "schedule": "frontier", "layers": [1, 2], "recompose": "dual"},
    {"objective": "fisher", "output_loss": "kl", "recompose": "dual"},
    {"objective": "squared", "interface": "block", "output_loss": "logit_cosine",
     "recompose": "fitted"},
    {"objective": "squared", "interface": "block", "output_loss": "none", "recompose": "lens"},
    {"recompose": "softmax", "interface": "attention"},
    {"recompose": "top_k", "top_k": 20},
    {"recompose": "dual", "source_base": True},
    {"method": "sft"},
    {"method": "kd", "kl_kind": "jsd"},
    {"method": "hidden_kd"},
    {"method": "seeking"},
    {"method": "laten"},
    {"solver": "ridge"},
    {"warm_start": True},
    {"preset": "best", "min_rows": 0},
]  # fmt: skip


@pytest.mark.parametrize("way", WAYS, ids=lambda way: " ".join(map(str, way.values())))
def test_every_way_gives_the_same_adapter_with_a_directory(way, tmp_path):
    def run(store):
        options = {"layers": [1], "steps": 2, **way}
        if way.get("source_base"):
            options["source_base"] = sized_model("llama", 3, 24, 4)
        return pkt_fast.transfer(
            sized_model("llama", 1, 24, 4), sized_model("llama", 2, 16, 3), ROWS,
            tokenizer=TOKENIZER, batch_size=9, learning_rate=3e-3, store=store, progress=False,
            **options,
        )  # fmt: skip

    memory, written, reused = run("memory"), run(tmp_path), run(tmp_path)
    for name, change in memory.delta.changes.items():
        assert change.matrix().any()
        for other in (written, reused):
            assert torch.equal(change.matrix(), other.delta.changes[name].matrix()), name
    passes = {"source pass", "target pass"}
    assert passes & set(written.report["phases"]) == passes & set(memory.report["phases"])
    assert not passes & set(reused.report["phases"])


def test_batches_are_copied_on_the_stream_of_the_caller(monkeypatch):
    """The thread that prepares them has a current device and stream of its own."""
    entered = []

    @contextlib.contextmanager
    def stream(wanted):
        entered.append((wanted, threading.current_thread() is threading.main_thread()))
        yield

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"the caller's on {device}")
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(Loader, "build", lambda self, examples: examples)
    for device, wanted in (("cuda:1", [("the caller's on cuda:1", False)] * 2), ("cpu", [])):
        loader = Loader([], None, None, torch.device(device), 0, torch.float32)
        assert list(loader.stream([[0], [1]])) == [[0], [1]]
        assert entered == wanted
        entered.clear()
