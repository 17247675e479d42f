"""Every full-scale config is traced, sharded and lowered at its real size on 8 virtual devices."""

import json
import math

import jax
import pytest
from jax.sharding import PartitionSpec

from transfer_jax.configuration import ConfigError, apply_overrides, get_config, list_configs
from transfer_jax.papers import s4
from transfer_jax.training import Experiment, Layout, make_mesh
from transfer_jax.training.aot import lower_step
from transfer_jax.training.profiling import compiled_flops
from transfer_jax.training.sharding import bytes_per_device, placement_table
from transfer_jax.trees import path_str

FULL = [
    variant
    for variant in list_configs()["s4"].variants
    if get_config(f"s4:{variant}").get("model", {}).get("dtype") == "bfloat16"
]


def layout_of(config, data, model):
    rules = tuple((pattern, PartitionSpec(*spec)) for pattern, spec in config.sharding.rules)
    return Layout(make_mesh({"data": data, "model": model}), rules, config.sharding.min_size)


def planned(variant, *overrides):
    config = apply_overrides(get_config(f"s4:{variant}"), overrides)
    # The published batches of 50 divide by 2, not by 4.
    data = 2 if config.batch_size % 4 else 4
    layout = layout_of(config, data, 8 // data)
    return layout, lower_step(*s4.plan(config), layout)


def test_all_published_experiments_are_here():
    assert len(FULL) == 18


@pytest.mark.parametrize("variant", FULL)
def test_full_scale_configs_lower(variant):
    layout, (lowered, arrays) = planned(variant)
    text = lowered.as_text()
    assert "sdy.mesh" in text or "mhlo.num_partitions = 8" in text
    per_device, whole = bytes_per_device(arrays), sum(
        math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(arrays)
    )  # fmt: skip
    print(f"\n{variant}: {per_device / 2**20:.1f} of {whole / 2**20:.1f} MiB on a device")
    print(placement_table(arrays))
    assert per_device < whole
    # What the rules split is split, and Adam's moments lie where their parameters do.
    split = {
        path_str(kp): x for kp, x in jax.tree_util.tree_leaves_with_path(arrays)
        if path_str(kp).endswith("ssm/c")
    }  # fmt: skip
    assert {path.split("/")[0] for path in split} == {"params", "optimizer"}
    for x in split.values():
        assert x.sharding.shard_shape(x.shape)[1] == x.shape[1] // layout.mesh.shape["model"]
    if variant == "wikitext103":
        count = sum(x.size for x in jax.tree.leaves(arrays["params"]))
        assert count == pytest.approx(249e6, rel=0.03)
    if variant == "text_v1":  # compiles for eight devices
        memory = lowered.compile().memory_analysis()
        print(f"temporaries {memory.temp_size_in_bytes / 2**30:.2f} GiB on a device")
        # What stays on the devices, and the batch: 25 rows of 4096 + 2 integers.
        arguments = per_device + 25 * (4096 + 2) * 4
        assert memory.argument_size_in_bytes == pytest.approx(arguments, rel=0.01)


def test_the_lowered_step_is_the_one_that_fit_runs(tmp_path):
    config = apply_overrides(
        get_config("s4:digits"),
        ["model.features=8", "model.depth=1", "s4.state_size=4", "train.steps=1", "batch_size=8",
         "train.optimizer.warmup_steps=0", "mesh.data=4", "mesh.model=2"],
    )  # fmt: skip
    with config.unlocked():
        config.sharding.rules = get_config("s4:listops").sharding.rules
    exp = Experiment(config, tmp_path)
    exp.run()
    lowered, arrays = lower_step(*s4.plan(config), exp.layout)
    assert (tmp_path / "stages/train/layout.txt").read_text() == placement_table(arrays) + "\n"
    flops = json.loads((tmp_path / "stages/train/summary.json").read_text())["flops_per_step"]
    assert compiled_flops(lowered.compile()) * 8 == flops > 0


def test_a_batch_that_does_not_divide_is_refused():
    config = get_config("s4:listops")
    with pytest.raises(ConfigError, match="batch of 50 does not divide"):
        lower_step(*s4.plan(config), layout_of(config, 4, 2))


def test_a_rule_that_does_not_fit_is_named():
    config = apply_overrides(get_config("s4:listops"), ["model.features=6", "model.depth=1"])
    with pytest.raises(ValueError, match="unequal pieces"):
        lower_step(*s4.plan(config), layout_of(config, 2, 4))
