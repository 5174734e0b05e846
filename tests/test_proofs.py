"""The proof obligations of the design, end to end on real models: removal is zeroing, the score is a derivative, training
goes on after the cut, and a model that cannot be pruned is reported and left alone."""

import copy
import functools

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision import models

import taylored

FAMILIES = [
    "alexnet", "vgg11", "vgg11_bn", "resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2", "densenet121", "googlenet",
    "inception_v3", "mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large", "mnasnet0_5", "shufflenet_v2_x1_0",
    "squeezenet1_0", "efficientnet_b0", "efficientnet_v2_s", "regnet_x_400mf", "regnet_y_400mf", "convnext_tiny",
]  # fmt: skip
OTHERS = [
    n for n in models.list_models(module=models)
    if n not in FAMILIES and not n.startswith(("vit", "swin", "maxvit"))
]  # fmt: skip


def build(name):
    """A model with statistics like a trained one's: those of a batch, then disturbed at random."""
    torch.manual_seed(0)
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    model = models.get_model(name, weights=None, **options).eval()
    size = {"inception_v3": 160, "alexnet": 96}.get(name, 64)
    x = 2 * torch.randn(6, 3, size, size)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.train().momentum = 1.0
    with torch.no_grad():
        model(x)
    for norm in norms:
        scale = norm.running_var.sqrt()
        norm.running_mean.add_(0.2 * scale * torch.randn_like(scale))
        norm.running_var.mul_(torch.rand_like(scale) + 0.5)
        norm.weight.data.uniform_(0.7, 1.3), norm.bias.data.normal_(0, 0.2)
    for parameter_name, parameter in model.named_parameters():
        if "layer_scale" in parameter_name:
            parameter.data.uniform_(0.5, 1.5)
    return model.eval(), x[:2]


def check_removal(name):
    model, x = build(name)
    with pytest.warns(UserWarning) if name == "inception_v3" else torch.no_grad():  # its auxiliary head needs larger images
        graph = taylored.trace(model, x)
    for seed, ratio in enumerate((0.2, 0.5, 0.8)):
        plan = taylored.random_plan(graph, ratio, seed=seed)
        small = copy.deepcopy(model)
        parameters = list(small.parameters())
        with torch.no_grad():
            with taylored.masked(small, graph, plan):
                expected = small(x)
            taylored.compact(small, plan)
            with FlopCounterMode(display=False) as counter:
                actual = small(x)
        if ratio == 0.2:  # a deeper random cut may leave a dead net
            assert (expected[0] - expected[1]).abs().max() > 1e-3 * expected.abs().max()
        assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max()
        assert counter.get_total_flops() == plan.flops[1]
        assert sum(p.numel() for p in small.parameters()) == plan.params[1]
        assert all(a is b for a, b in zip(parameters, small.parameters(), strict=True))
        for module in small.modules():
            if isinstance(module, nn.Conv2d):
                assert module.weight.shape[:2] == (module.out_channels, module.in_channels // module.groups)
            elif isinstance(module, nn.Linear):
                assert module.weight.shape == (module.out_features, module.in_features)
            elif isinstance(module, nn.BatchNorm2d):
                assert module.num_features == len(module.running_mean)


@pytest.mark.parametrize("name", FAMILIES)
def test_removal_is_zeroing(name):
    check_removal(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_removal_is_zeroing_in_every_variant(name):
    check_removal(name)


class Mixed(nn.Module):
    """Residual sum, depthwise convolution, squeeze-excitation, concatenation, flatten to linear."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.branch = nn.Conv2d(8, 8, 3, padding=1)
        self.depthwise, self.wide = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 12, 1)
        self.squeeze, self.excite = nn.Conv2d(12, 4, 1), nn.Conv2d(4, 12, 1)
        self.last, self.head = nn.Conv2d(20, 6, 1), nn.Linear(6 * 16, 5)

    def forward(self, x):
        x = self.norm(self.stem(x)).tanh()
        y = x + self.branch(x).tanh()
        z = self.wide(self.depthwise(y)).sigmoid()
        z = z * self.excite(self.squeeze(z.mean((2, 3), keepdim=True)).tanh()).sigmoid()
        return self.head(nn.functional.avg_pool2d(self.last(torch.cat([y, z], 1)).tanh(), 2).flatten(1))


def test_the_score_is_a_derivative():
    torch.manual_seed(0)
    model, x, y = Mixed().double().eval(), torch.randn(3, 3, 8, 8).double(), torch.tensor([0, 1, 2])
    graph = taylored.trace(model, x)
    for p in model.parameters():
        p.requires_grad_(False)  # frozen weights are scored all the same
    with taylored.TaylorScorer(model, graph, reduction="square") as scorer:
        nn.functional.cross_entropy(model(x), y).backward()
    scores = scorer.scores()
    assert not any(m._forward_pre_hooks for m in model.modules())

    def loss(group, unit, n, eps):
        handles = []
        for consumer, slots in group.inputs.items():
            scale = torch.ones(len(graph.layers[consumer].inputs), dtype=torch.float64)
            scale[slots[unit]] += eps
            shape = (1, -1, 1, 1) if graph.layers[consumer].is_convolution else (1, -1)
            scale = scale.reshape(shape)
            hook = functools.partial(lambda s, _, args: (args[0] * s,), scale)
            handles.append(model.get_submodule(consumer).register_forward_pre_hook(hook))
        value = float(nn.functional.cross_entropy(model(x[n : n + 1]), y[n : n + 1]))
        for handle in handles:
            handle.remove()
        return value

    for group in graph.groups:
        for unit in range(0, group.units, 3):
            d = [(loss(group, unit, n, 1e-4) - loss(group, unit, n, -1e-4)) / 2e-4 / group.positions for n in range(3)]
            expected = sum(v * v for v in d) / 3
            assert float(scores[group.name][unit]) == pytest.approx(expected, rel=1e-6)


def test_scores_are_the_same_when_the_model_was_compiled_before():
    torch.manual_seed(0)
    model, x, y = Mixed().eval(), torch.randn(3, 3, 8, 8), torch.tensor([0, 1, 2])
    graph = taylored.trace(model, x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(x).sum().backward()
    scores = []
    for runner in (model, compiled):
        with taylored.TaylorScorer(runner, graph) as scorer:
            nn.functional.cross_entropy(runner(x), y).backward()
        scores.append(scorer.scores())
    for name in scores[0]:
        torch.testing.assert_close(scores[0][name], scores[1][name])


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.01),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.01),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on(name):
    torch.manual_seed(0)
    model, x = Mixed(), torch.randn(4, 3, 8, 8)
    optimizer = OPTIMIZERS[name](model.parameters())
    kept_alive = model(x).square().sum()  # a loss that the training script still holds
    kept_alive.backward()
    optimizer.step()
    plan = taylored.random_plan(taylored.trace(model, x), 0.5)

    # The same cut by hand, on a copy: new parameters, new optimizer, state moved over.
    def cut(tensor, key):
        for (owner, d), keep in plan.keep.items():
            if owner == key and tensor.ndim > d:
                tensor = tensor.index_select(d, keep)
        return tensor.clone()

    state = [
        {k: cut(v, n) if torch.is_tensor(v) and v.shape == p.shape else copy.deepcopy(v) for k, v in optimizer.state[p].items()}
        for n, p in model.named_parameters()
    ]
    tensors = {n: cut(t.detach(), n) for n, t in model.state_dict().items()}
    taylored.compact(model, plan, optimizer=optimizer)
    twin = copy.deepcopy(model)
    for n, t in {**dict(twin.named_parameters()), **dict(twin.named_buffers())}.items():
        t.data = tensors[n]
        t.grad = None
    twin_optimizer = OPTIMIZERS[name](twin.parameters())
    for p, s in zip(twin.parameters(), state, strict=True):
        twin_optimizer.state[p] = s
    for net, opt in ((model, optimizer), (twin, twin_optimizer)):
        opt.zero_grad()
        net(x).square().sum().backward()
        opt.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b)


class HardCoded(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.a, self.b, self.how = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8 * 16, 2), how
        self.c = nn.Conv2d(4, 8, 1)

    def forward(self, x):
        x = self.a(x)
        if self.how == "view":
            return self.b(x.view(-1, 128))
        x, y = x.split([4, 4], 1)
        return self.b((self.c(x) + self.c(y)).flatten(1))


def test_a_hard_coded_channel_count_is_reported_and_nothing_changes():
    model, x = HardCoded("view"), torch.randn(2, 3, 4, 4)
    graph = taylored.trace(model, x)
    plan = taylored.random_plan(graph, 0.5)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(taylored.TraceError, match=r"test_proofs\.py:\d+"):
        taylored.compact(model, plan)
    assert model.a.out_channels == 8
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_an_op_without_a_rule_freezes_what_it_touches_and_says_so():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.LocalResponseNorm(3), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 2, 1))
    model[1].forward = lambda x: torch.cumsum(x, 1)
    graph = taylored.trace(model, torch.randn(2, 3, 4, 4))
    assert [g.name for g in graph.groups] == ["2"]
    assert "cumsum" in graph.explain("0")


def test_save_and_load_into_a_fresh_model(tmp_path):
    model, x = Mixed().eval(), torch.randn(2, 3, 8, 8)
    fresh = copy.deepcopy(model)
    plan = taylored.random_plan(taylored.trace(model, x), 0.5)
    taylored.compact(model, plan)
    taylored.save(tmp_path / "p.safetensors", model, plan)
    assert taylored.load(tmp_path / "p.safetensors", fresh) == plan
    assert torch.equal(model(x), fresh(x))
    data = bytearray((tmp_path / "p.safetensors").read_bytes())
    for position in (3, 40, len(data) // 2, len(data) - 1):
        broken = bytearray(data)
        broken[position] ^= 0x10
        (tmp_path / "b.safetensors").write_bytes(broken)
        other = Mixed()
        with pytest.raises(ValueError):
            taylored.load(tmp_path / "b.safetensors", other)
        assert other.stem.out_channels == 8


def test_the_loop_meets_its_budget_and_resumes(tmp_path):
    torch.manual_seed(0)
    data = [(torch.randn(8, 3, 8, 8), torch.randint(0, 5, (8,))) for _ in range(4)]
    options = {
        "target_flops": 0.5,
        "rounds": 3,
        "round_epochs": 0.5,
        "final_epochs": 1,
        "checkpoint": tmp_path / "c",
        "progress": False,
    }
    events = []

    def run(model, loss_fn=nn.functional.cross_entropy, **more):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        return taylored.prune(model, data, loss_fn, optimizer, torch.zeros(1, 3, 8, 8), log=events.append, **options, **more)

    def fails_in_round_2(out, y):
        return nn.functional.cross_entropy(out, y) * (float("nan") if len(events) > 1 else 1)

    with pytest.raises(FloatingPointError, match="round 2"):
        run(Mixed(), fails_in_round_2)
    model = Mixed()
    result = run(model, resume=True)
    assert [e["event"] for e in result.history] == ["start", "round", "round", "round", "final_epoch"]
    assert result.plan.flops[1] <= 0.5 * result.plan.flops[0]
    fresh = Mixed()
    taylored.load(tmp_path / "c", fresh)
    assert fresh.stem.out_channels == model.stem.out_channels
    with pytest.raises(taylored.PlanError, match="target_flops"):
        options["target_flops"] = 0.001
        run(Mixed())
    data.clear()
    with pytest.raises(ValueError, match="train_loader is empty"):
        run(Mixed())
