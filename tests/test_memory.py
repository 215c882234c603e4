import gc
from dataclasses import replace

import pytest
import torch

from oracles import loaded, random_trees
from upweight.data.pack import collate
from upweight.models.adapter import add_lora
from upweight.models.head import KEPT_ELEMENTS
from upweight.models.load import ForwardPlan
from upweight.models.logprobs import token_logps
from upweight.training import memory
from upweight.training.memory import enough_tokens, free_bytes, plan_memory, size

TREES = random_trees([(30, 12, 20), (50, 9), (7, 7, 7, 7)])
STEPS = [(0, 1), (2,)]


def kept_by(lm, trees):
    """Bytes of what the backward pass of a bin finds, each storage once, weights aside."""
    storages = {}
    weights = {p.untyped_storage().data_ptr() for p in lm.model.parameters()}

    def note(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        token_logps(lm, collate(trees))
    return sum(size for at, (size, _) in storages.items() if at not in weights)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_the_activations_of_a_large_bin_are_told_from_small_ones(family):
    lm = loaded(family)
    plan = plan_memory(lm, TREES, STEPS, 4096)
    trees = random_trees([(40, 20, 20)] * 12)
    num_tokens = sum(tree.num_tokens for tree in trees)
    # The head's exponentials are kept beside saved tensors.
    told = plan.activations(num_tokens) - plan.per_scored * plan.scored_share * num_tokens
    # Masks and tiles grow with their own shapes, which are not the probe's.
    assert told == pytest.approx(kept_by(lm, trees), rel=0.2)


def test_weights_gradients_and_moments_are_counted_in_bytes():
    lm = loaded()
    weights = sum(p.numel() * 4 for p in lm.model.parameters())
    plan = plan_memory(lm, TREES, STEPS, 64)
    assert (plan.weights, plan.gradients, plan.moments) == (weights, weights, 2 * weights)
    assert (plan.longest, plan.largest_bin) == (62, 64)

    adapted = add_lora(loaded(), rank=4, alpha=8.0, dropout=0.0, targets="all-linear", seed=0)
    trained = sum(p.numel() * 4 for p in adapted.model.parameters() if p.requires_grad)
    plan = plan_memory(adapted, TREES, STEPS, 20)
    assert (plan.gradients, plan.moments) == (trained, 2 * trained)
    assert plan.weights == weights + trained
    # A tree is not cut: the largest bin holds the longest one.
    assert plan.largest_bin == 62
    # And no bin holds more than a step: 62 + 59 tokens.
    assert plan_memory(lm, TREES, STEPS, 4096).largest_bin == 121


def test_bins_are_as_large_as_memory_allows_up_to_where_more_is_no_faster(monkeypatch):
    lm = loaded()
    plenty = plan_memory(lm, TREES, STEPS)
    assert plenty.tokens_per_bin == memory.TOKENS_PER_BIN["cpu"] == 2048
    per_thousand = plenty.activations(1000) - plenty.activations(0)
    room = plenty.gradients + plenty.moments + plenty.fixed + per_thousand
    monkeypatch.setattr(memory, "free_bytes", lambda device: int(room / memory.SHARE))
    # 1000 tokens fit; bins are cut to a multiple of 256.
    assert plan_memory(lm, TREES, STEPS).tokens_per_bin == 768
    monkeypatch.setattr(memory, "free_bytes", lambda device: 0)
    assert plan_memory(lm, TREES, STEPS).tokens_per_bin == 256
    assert plan_memory(lm, TREES, STEPS, 5000).tokens_per_bin == 5000


def test_what_the_head_keeps_at_most_is_not_counted_twice():
    plan = plan_memory(loaded(), TREES, STEPS, 64)
    assert plan.most_scored == 4 * KEPT_ELEMENTS
    plan = replace(plan, fixed=100, per_token=10, per_scored=20, scored_share=0.5, most_scored=500)
    # Up to 50 tokens 20 bytes each, from there on 10.
    assert [plan.activations(n) for n in (10, 50, 51, 100)] == [300, 1100, 1110, 1600]
    for num_bytes in (*range(90, 1700, 7), 1100, 1600):
        most = plan.fits(num_bytes)
        assert most == 0 or plan.activations(most) <= num_bytes
        assert plan.activations(most + 1) > num_bytes
    endless = replace(plan, per_token=0)
    assert endless.fits(599) == 49 and endless.fits(601) is None


@pytest.mark.parametrize(
    ("device", "plan", "enough"),
    [
        ("cuda", dict(attention="flex"), 32768),
        ("cuda", dict(attention="dense"), 4096),
        ("cuda", dict(attention="dense", shared=False, reason="a test"), 32768),
        ("cpu", dict(attention="dense"), 2048),
    ],
)
def test_bins_are_small_where_a_mask_grows_with_their_square(device, plan, enough):
    lm = replace(loaded(), device=torch.device(device), plan=ForwardPlan(**plan))
    assert enough_tokens(lm) == enough


def test_a_plan_says_what_is_needed_and_what_is_missing(monkeypatch):
    lm = loaded()
    monkeypatch.setattr(memory, "free_bytes", lambda device: None)
    assert "free" not in plan_memory(lm, TREES, STEPS).describe()
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1 << 40)
    said = plan_memory(lm, TREES, STEPS).describe()
    assert "1024.0 GiB are free" in said and "too little" not in said
    total, parts = said.splitlines()
    assert total.startswith("memory: about ") and len(total) <= 80
    assert parts.startswith("  = weights ") and " + gradients " in parts
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1000)
    assert "too little: compute.checkpointing=true" in plan_memory(lm, TREES, STEPS).describe()


def test_the_free_memory_of_this_machine_is_known_or_said_to_be_unknown():
    free = free_bytes(torch.device("cpu"))
    assert free is None or free > 1 << 20


def machine(root, group, files):
    """Where /proc and /sys say that 1000 KiB are available, and what `files` has."""
    files = {
        "proc/meminfo": "MemTotal: 9000 kB\nMemAvailable: 1000 kB\n",
        "proc/self/cgroup": f"7:cpu,cpuacct:/\n{group}\n",
        **files,
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


V1 = "sys/fs/cgroup/memory"
UNLIMITED = "9223372036854771712\n"


@pytest.mark.parametrize(
    ("group", "files", "free"),
    [
        pytest.param("0::/", {}, 1000 * 1024, id="no limit"),
        pytest.param(
            "0::/",
            {
                "sys/fs/cgroup/memory.max": "5000\n",
                "sys/fs/cgroup/memory.current": "3000\n",
                "sys/fs/cgroup/memory.stat": "anon 2000\ninactive_file 400\n",
            },
            2400,
            id="version 2, a container's own view",
        ),
        pytest.param(
            "0::/a/b",
            {
                "sys/fs/cgroup/a/b/memory.max": "max\n",
                "sys/fs/cgroup/a/b/memory.current": "3000\n",
                "sys/fs/cgroup/a/b/memory.stat": "",
                "sys/fs/cgroup/a/memory.max": "4000\n",
                "sys/fs/cgroup/a/memory.current": "3500\n",
                "sys/fs/cgroup/a/memory.stat": "",
            },
            500,
            id="version 2, a limit further up",
        ),
        pytest.param(
            "4:memory:/docker/x",
            {
                f"{V1}/memory.limit_in_bytes": "6000\n",
                f"{V1}/memory.usage_in_bytes": "1000\n",
                f"{V1}/memory.stat": "inactive_file 7\ntotal_inactive_file 10\n",
            },
            5010,
            id="version 1, outside's name",
        ),
        pytest.param(
            "4:memory:/",
            {
                f"{V1}/memory.limit_in_bytes": UNLIMITED,
                f"{V1}/memory.usage_in_bytes": "1000\n",
                f"{V1}/memory.stat": "",
            },
            1000 * 1024,
            id="version 1, no limit",
        ),
    ],
)
def test_a_containers_limit_counts_where_it_is_lower_than_what_the_host_has(
    tmp_path, group, files, free
):
    assert free_bytes(torch.device("cpu"), machine(tmp_path, group, files)) == free


@pytest.mark.parametrize(
    ("num_bytes", "said"),
    [(12, "12 bytes"), (2048, "2 KiB"), (3 << 20, "3 MiB"), (3 << 29, "1.5 GiB")],
)
def test_sizes_are_said_in_binary_units(num_bytes, said):
    assert size(num_bytes) == said


def test_what_is_planned_with_leaves_nothing_in_memory():
    """The plan's forward passes are kept for no backward pass: weights in the compute dtype and
    activations stayed for the whole run, and in a comparison for all that followed it."""
    lm = loaded()
    lm.compute_dtype = torch.bfloat16

    def tensors():
        gc.collect()
        return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())

    plan_memory(lm, TREES, STEPS, 64)
    before = tensors()
    plan_memory(lm, TREES, STEPS, 64)
    assert tensors() == before
    plan_memory(replace(lm, offload=True), TREES, STEPS, 64)
    assert tensors() == before
