"""Safetensors files: what comes back, what is refused, and agreement with the public package."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from transfer_jax import trees
from transfer_jax.trees import files
from transfer_jax.trees.files import Checkpoint, load_safetensors, save_safetensors

DTYPES = sorted(map(str, files._CODES))


def random(dtype, shape=(3, 5)):
    bits = np.random.default_rng(0).integers(-100, 100, size=shape)
    return (bits > 0 if dtype == "bool" else bits / (1 if "int" in dtype else 8)).astype(
        jnp.dtype(dtype)
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_comes_back_as_it_was(dtype, tmp_path):
    tree = {
        "a": {"x": random(dtype)},
        "scalar": random(dtype, ()),
        "empty": random(dtype, (0, 4)),
        "odd": random("uint8", (3,)),  # What follows it in the file would not be aligned.
        "last": random(dtype, (2, 3))[:, ::-1].T,  # Not contiguous.
    }
    save_safetensors(tree, tmp_path / "m.safetensors")
    loaded = load_safetensors(tmp_path / "m.safetensors", like=tree)
    assert jax.tree.structure(loaded) == jax.tree.structure(tree)
    for x, y in zip(jax.tree.leaves(loaded), jax.tree.leaves(tree)):
        assert x.dtype == y.dtype and x.shape == y.shape
        np.testing.assert_array_equal(x, y)
    named = load_safetensors(tmp_path / "m.safetensors")
    assert set(named) == {"a.x", "scalar", "empty", "odd", "last"}
    assert all(x.ctypes.data % 64 == 0 for x in named.values() if x.size)


def test_the_safetensors_package_reads_and_writes_the_same(tmp_path):
    safetensors = pytest.importorskip("safetensors")
    numpy = pytest.importorskip("safetensors.numpy")
    tensors = {f"x.{d}": random(d) for d in DTYPES if "float8" not in d and "complex" not in d}
    save_safetensors(tensors, tmp_path / "ours.safetensors", metadata={"step": "3"})
    theirs = numpy.load_file(tmp_path / "ours.safetensors")
    with safetensors.safe_open(tmp_path / "ours.safetensors", framework="np") as file:
        assert file.metadata() == {"format": "pt", "step": "3"}
    numpy.save_file(tensors, tmp_path / "theirs.safetensors")
    ours = load_safetensors(tmp_path / "theirs.safetensors")
    for found in (ours, theirs):
        assert set(found) == set(tensors)
        for name, x in tensors.items():
            assert found[name].dtype == x.dtype
            np.testing.assert_array_equal(found[name], x)


def test_torch_reads_bfloat16(tmp_path):
    torch = pytest.importorskip("torch")
    load_file = pytest.importorskip("safetensors.torch").load_file
    x = random("bfloat16")
    save_safetensors({"w": jnp.asarray(x)}, tmp_path / "m.safetensors")
    loaded = load_file(tmp_path / "m.safetensors")["w"]
    assert loaded.dtype == torch.bfloat16
    np.testing.assert_array_equal(loaded.float().numpy(), x.astype(np.float32))


def test_shards_have_an_index_and_come_back(tmp_path):
    tree = {f"layer_{i}": {"w": random("float32", (4, 8)) + i} for i in range(5)}  # 128 bytes each
    tree["large"] = random("float64", (100,))  # More than fits a shard.
    save_safetensors(tree, tmp_path / "m", max_shard_size=300)
    names = sorted(p.name for p in (tmp_path / "m").iterdir())
    assert names == [f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)] + [files.INDEX]
    index = json.loads((tmp_path / "m" / files.INDEX).read_text())
    assert index["metadata"]["total_size"] == 5 * 128 + 800
    assert index["weight_map"].keys() == {"large", *(f"layer_{i}.w" for i in range(5))}
    for path in (tmp_path / "m", tmp_path / "m" / files.INDEX):
        loaded = load_safetensors(path, like=tree)
        jax.tree.map(np.testing.assert_array_equal, loaded, tree)


def test_linen_params_from_shapes_alone(tmp_path):
    model = nn.Sequential([nn.Dense(3), nn.Dense(2)])
    params = model.init(jax.random.key(0), jnp.ones((1, 4)))["params"]
    save_safetensors(params, tmp_path, separator="/")
    assert set(Checkpoint(tmp_path).specs) == set(trees.paths(params))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.ones((1, 4)))["params"])
    loaded = load_safetensors(tmp_path, like=shapes, separator="/")
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(loaded))
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_dtype_and_sharding_are_those_of_like(tmp_path):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.P("data"))
    w = jax.device_put(jnp.arange(8.0), sharding)
    save_safetensors({"w": w}, tmp_path / "m.safetensors")
    shape = jax.ShapeDtypeStruct((8,), jnp.bfloat16, sharding=sharding)
    for like in (shape, jax.device_put(jnp.zeros(8, jnp.bfloat16), sharding)):
        loaded = load_safetensors(tmp_path / "m.safetensors", like={"w": like})["w"]
        assert loaded.dtype == jnp.bfloat16 and loaded.sharding == sharding
        np.testing.assert_array_equal(loaded, w)


def test_strictness_lists_everything(tmp_path):
    save_safetensors(
        {"kept": np.zeros(2), "extra": np.zeros((1, 2)), "kernel_0": np.zeros(1),
         "shape": np.zeros((2, 3)), "count": np.zeros(2, np.int32)}, tmp_path,
    )  # fmt: skip
    like = {"kept": np.zeros(2), "lacking": np.zeros(2), "kernel_1": np.zeros(1),
            "shape": np.zeros((3, 2)), "count": np.zeros(2)}  # fmt: skip
    with pytest.raises(ValueError) as error:
        load_safetensors(tmp_path, like=like)
    for part in (
        "missing: kernel_1 (the file has kernel_0), lacking",
        "unexpected: ", "extra (1, 2)", "kernel_0 (1,)",
        "shapes: shape is (2, 3) in the file, (3, 2) was expected",
        "dtypes: count is int32 in the file, float64 was expected",
    ):  # fmt: skip
        assert part in str(error.value)
    assert "kept" not in str(error.value)


@pytest.mark.parametrize(
    "tree, message",
    [
        ({"a.b": 1.0, "a": {"b": 2.0}}, "two leaves have the name 'a.b'"),
        ({"f": len}, "'f' is builtin"),
        ({"k": jax.random.key(0)}, "key_data"),
        ({"i": np.zeros(2, ml_dtypes.int4)}, "int4, which safetensors files lack"),
    ],
)
def test_what_has_no_place_in_a_file(tree, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        save_safetensors(tree, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=message):
        save_safetensors(tree, tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_replaced_as_a_whole_and_a_directory_never(tmp_path):
    file = tmp_path / "m.safetensors"
    save_safetensors({"w": np.zeros(2)}, file)
    save_safetensors({"v": np.ones(2)}, file)
    assert set(load_safetensors(file)) == {"v"}
    assert list(tmp_path.iterdir()) == [file]
    with pytest.raises(FileExistsError, match="exists already"):
        save_safetensors({"w": np.zeros(2)}, tmp_path)
    with pytest.raises(ValueError, match="one file"):
        save_safetensors({"w": np.zeros(2)}, file, max_shard_size=3)


def test_an_error_while_writing_leaves_nothing(tmp_path):
    with pytest.raises(KeyError), files.new_directory(tmp_path / "out") as partial:
        (partial / "a").write_text("half")
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    # What a killed process has left is cleared away; what another writes is not touched.
    (tmp_path / ".out.partial" / "sub").mkdir(parents=True)
    with files.new_directory(tmp_path / "out") as partial:
        assert list(partial.iterdir()) == []
        (partial / "a").write_text("whole")
        with (
            pytest.raises(RuntimeError, match="another process"),
            files.new_directory(tmp_path / "out"),
        ):
            pass
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "a").read_text() == "whole"


def break_index(path, **changes):
    index = json.loads((path / files.INDEX).read_text())
    index["weight_map"].update(changes)
    (path / files.INDEX).write_text(json.dumps(index))


def rewrite_header(file, **changes):
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["b"].update(changes)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


DAMAGES = {
    "cut": (lambda p: p.write_bytes(p.read_bytes()[:-1]), "cut off"),
    "no header": (lambda p: p.write_bytes(b"ab"), "no safetensors file"),
    "long header": (lambda p: p.write_bytes(b"\xff" * 20), "no safetensors file"),
    "no json": (lambda p: p.write_bytes((4).to_bytes(8, "little") + b"{{{{"), "header"),
    "no entry": (lambda p: p.write_bytes((10).to_bytes(8, "little") + b'{"a": 1}  '), "header"),
    "dtype": (lambda p: rewrite_header(p, dtype="F3"), "'b' .* F3; known are F64"),
    "shape": (lambda p: rewrite_header(p, shape=[7]), "'b' .*does not fit bytes"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_refused(damage, tmp_path):
    file = tmp_path / "m.safetensors"
    save_safetensors({"a": np.zeros(2), "b": np.zeros(3)}, file)
    break_it, message = DAMAGES[damage]
    break_it(file)
    with pytest.raises(ValueError, match=message):
        Checkpoint(file)


def test_incomplete_checkpoints_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        Checkpoint(tmp_path / "nowhere")
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(FileNotFoundError, match=r"neither .* it has pytorch_model\.bin"):
        Checkpoint(tmp_path)
    tree = {"a": np.zeros(2), "b": np.zeros(3)}
    save_safetensors(tree, tmp_path / "m", max_shard_size=1)
    break_index(tmp_path / "m", c="model-00001-of-00002.safetensors")
    with pytest.raises(ValueError, match="has the tensor 'c'; it has not"):
        Checkpoint(tmp_path / "m")
    break_index(tmp_path / "m", c="elsewhere.safetensors")
    with pytest.raises(FileNotFoundError, match="elsewhere"):
        Checkpoint(tmp_path / "m")
    (tmp_path / "m" / files.INDEX).write_text("[]")
    with pytest.raises(ValueError, match="weight_map"):
        Checkpoint(tmp_path / "m")
