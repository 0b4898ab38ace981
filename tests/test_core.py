"""Guards of protoquant.core: streams of random numbers, hashes, files that are whole or absent."""
import json
import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from protoquant import core
from protoquant.core import ConfigError, DataError, StoreError
from pieces import python


def test_each_purpose_has_its_own_stream_and_the_global_one_is_left_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    draw = lambda *a: torch.rand(4, generator=core.generator(*a)).tolist()
    assert draw(40, "codebook") == draw(40, "codebook")
    assert len({tuple(draw(*a)) for a in ((40, "a"), (41, "a"), (40, "b"), (40, "a", "b"), (40,), (-1, "a"))}) == 6
    assert torch.equal(before, torch.get_rng_state())


def test_streams_are_the_same_in_another_process():
    code = "import json, torch; from protoquant.core import generator, hash_json; print(json.dumps([generator(40, 'x').initial_seed(), hash_json(dict(a=1, b=[2]))]))"
    assert python(code, PYTHONHASHSEED="1") == python(code, PYTHONHASHSEED="2") == [core.generator(40, "x").initial_seed(), core.hash_json(dict(b=[2], a=1))]


def test_set_seed_repeats_python_numpy_and_torch():
    import random
    def draw():
        core.set_seed(40)
        return random.random(), np.random.rand(), float(torch.rand(()))
    assert draw() == draw()
    core.set_seed(2**40)   # NumPy takes 32 bits only


@settings(max_examples=30, deadline=None)
@given(st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5) | st.none(), max_size=5))
def test_hash_of_json_ignores_order(d):
    assert core.hash_json(d) == core.hash_json(dict(reversed(list(d.items()))))


def test_hash_of_tensors_sees_names_types_shapes_and_values():
    a = torch.arange(4.)
    seen = [core.hash_tensors(t) for t in ({"a": a}, {"b": a}, {"a": a.double()}, {"a": a.view(2, 2)}, {"a": a + 1}, {"a": a[:0]}, {}, {"a": a.bfloat16()}, {"a": a[0]})]
    assert len(set(seen)) == len(seen)
    assert core.hash_tensors({"a": a.view(2, 2).T}) == core.hash_tensors({"a": a.view(2, 2).T.contiguous()})


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    f = tmp_path/"deep"/"x.json"
    core.write_json(f, dict(a=np.float32(1.5), b=torch.tensor(2), c=np.arange(2)))
    assert core.read_json(f) == dict(a=1.5, b=2, c=[0, 1])
    with pytest.raises(RuntimeError), core.atomic_path(f) as p:
        p.write_text("half")
        raise RuntimeError
    assert core.read_json(f)["a"] == 1.5 and [p.name for p in f.parent.iterdir()] == ["x.json"]
    assert f.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask():
    m = os.umask(0); os.umask(m)
    return m


def test_a_damaged_json_file_is_named(tmp_path):
    (tmp_path/"x.json").write_text('{"a": 1')
    with pytest.raises(DataError, match="x.json.*delete it"): core.read_json(tmp_path/"x.json")


def test_space_is_asked_for_where_the_folder_will_be(tmp_path, monkeypatch):
    core.require_space(tmp_path/"not"/"yet", 10, "a thing")
    monkeypatch.setattr(core.shutil, "disk_usage", lambda p: type("U", (), dict(free=2**20))())
    with pytest.raises(StoreError, match="a thing needs 1.00 GiB.*0.00 GiB.*PROTOQUANT_CACHE"): core.require_space(tmp_path, 2**30, "a thing")


@pytest.mark.parametrize("name", ["gpu", "cuda:x", ""])
def test_device_names(name):
    with pytest.raises(ConfigError, match="device="): core.pick_device(name)
    assert core.pick_device("cpu") == torch.device("cpu")


def test_an_absent_gpu_is_said_to_be_absent(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="no CUDA"): core.pick_device("cuda")
    assert core.pick_device("auto").type == "cpu"


def test_cache_folder_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("PROTOQUANT_CACHE", str(tmp_path/"c"))
    assert core.cache_dir("features") == tmp_path/"c"/"features" and (tmp_path/"c"/"features").is_dir()


def test_near_names():
    assert "resnet50" in core.nearest_names("resnt50", ["resnet50", "vit"]) and core.nearest_names("zzz", ["resnet50"]) == ""
