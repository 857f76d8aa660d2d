"""The discriminator against the reference, and its losses against values worked out by hand."""

import pytest
import torch
from golden_cases import assert_close, load_case, load_weights
from torch import nn

from vavae_tools.autoencoders.losses import PatchDiscriminator, adaptive_weight, generator_loss, hinge_loss
from vavae_tools.runtime.errors import UserError


def pictures(size: int = 32, batch: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture
def small() -> PatchDiscriminator:
    torch.manual_seed(0)
    return PatchDiscriminator(width=4)


def test_reference_in_evaluation():
    case, tensors = load_case("discriminator")
    model = PatchDiscriminator(width=case["constructor"]["ndf"]).eval()
    model.load_state_dict(load_weights("discriminator"))
    real, fake = model(tensors["real"]), model(tensors["fake"])
    tolerance = case["tolerance"]
    assert_close(real, tensors["logits_real_eval"], tolerance)
    assert_close(fake, tensors["logits_fake_eval"], tolerance)
    assert_close(hinge_loss(real, fake), tensors["hinge_d_loss_eval"][0], tolerance)
    assert_close(generator_loss(fake), tensors["g_loss_eval"][0], tolerance)


def test_reference_in_training():
    """Real and made pictures are normalised apart; running statistics see the real ones first."""
    case, tensors = load_case("discriminator")
    model = PatchDiscriminator(width=case["constructor"]["ndf"]).train()
    model.load_state_dict(load_weights("discriminator"))
    real, fake = model(tensors["real"]), model(tensors["fake"])
    tolerance = case["tolerance"]
    assert_close(real, tensors["logits_real_train"], tolerance)
    assert_close(fake, tensors["logits_fake_train"], tolerance)
    assert_close(hinge_loss(real, fake), tensors["hinge_d_loss_train"][0], tolerance)
    assert_close(generator_loss(fake), tensors["g_loss_train"][0], tolerance)
    after = {name.removeprefix("after_train_real_then_fake."): x for name, x in tensors.items() if "after" in name}
    assert len(after) == 6
    for name, expected in after.items():
        assert_close(model.state_dict()[name], expected, tolerance)


def test_reference_adaptive_weight():
    case, tensors = load_case("discriminator")
    for name, expected in case["adaptive_d_weight"]["values"].items():
        weight = 0.5 * adaptive_weight(tensors["grad_nll"], tensors[name], largest=1e4)
        assert_close(weight, torch.tensor(expected), case["tolerance"])


def test_names_and_shapes_of_the_published_one():
    shapes = {name: tuple(weights.shape) for name, weights in PatchDiscriminator().state_dict().items()}
    assert shapes.pop("main.0.weight") == (64, 3, 4, 4) and shapes.pop("main.0.bias") == (64,)
    assert shapes.pop("main.11.weight") == (1, 512, 4, 4) and shapes.pop("main.11.bias") == (1,)
    for conv, norm, channels, before in [(2, 3, 128, 64), (5, 6, 256, 128), (8, 9, 512, 256)]:
        assert shapes.pop(f"main.{conv}.weight") == (channels, before, 4, 4)
        for name in ("weight", "bias", "running_mean", "running_var"):
            assert shapes.pop(f"main.{norm}.{name}") == (channels,)
        assert shapes.pop(f"main.{norm}.num_batches_tracked") == ()
    assert shapes == {}
    assert sum(weights.numel() for weights in PatchDiscriminator().parameters()) == 2_765_633
    assert PatchDiscriminator(width=4, layers=5).main[-1].in_channels == 32  # eight times the width at most


def test_initial_weights():
    torch.manual_seed(0)
    model = PatchDiscriminator()
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 5000:
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.05)
            assert abs(module.weight.mean().item()) < 1e-3
        elif isinstance(module, nn.BatchNorm2d):
            assert module.weight.mean().item() == pytest.approx(1, abs=0.01)
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.2)
            assert not module.bias.any()


def test_by_hand():
    """One layer and constant weights: conv (0.5, bias 1) → LeakyReLU → conv to two channels (1) → BatchNorm in
    evaluation (mean 2, variance 4, scale 3, shift 1) → LeakyReLU → conv (0.25, bias −1)."""
    model = PatchDiscriminator(in_channels=1, width=1, layers=1).eval()
    first, _, second, norm, _, last = model.main
    for layer, value in ((first, 0.5), (second, 1.0), (last, 0.25)):
        nn.init.constant_(layer.weight, value)
    first.bias.data.fill_(1.0)
    last.bias.data.fill_(-1.0)
    norm.weight.data.fill_(3.0)
    norm.bias.data.fill_(1.0)
    norm.running_mean.fill_(2.0)
    norm.running_var.fill_(4.0)
    norm.eps = 0.0
    x = torch.ones(1, 1, 6, 6)
    seen = torch.tensor([9.0] * 4 + [12.0] * 4 + [16.0])  # ones in 4×4 windows, stride 2: corners, edges, the middle
    # the second convolution sees all nine from each of its 2×2 places, the last one all of these
    normalised = ((0.5 * seen + 1).sum() - 2) / 2 * 3 + 1
    torch.testing.assert_close(model(x), (0.25 * 4 * 2 * normalised - 1).view(1, 1, 1, 1))
    normalised = (0.2 * (1 - 0.5 * seen).sum() - 2) / 2 * 3 + 1  # below zero everywhere: a fifth is let through
    torch.testing.assert_close(model(-x), (0.25 * 4 * 2 * 0.2 * normalised - 1).view(1, 1, 1, 1))


def test_a_logit_sees_70_pixels():
    model = PatchDiscriminator(width=4).eval()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.constant_(module.weight, 0.01)
    x = torch.zeros(1, 3, 160, 160, requires_grad=True)
    logits = model(x)
    assert logits.shape == (1, 1, 18, 18)
    (seen,) = torch.autograd.grad(logits[0, 0, 9, 9], x, retain_graph=True)
    (beside,) = torch.autograd.grad(logits[0, 0, 9, 10], x)
    columns = [gradient.abs().sum((0, 1, 2)).nonzero().flatten() for gradient in (seen, beside)]
    assert len(columns[0]) == 70 and columns[0][-1] - columns[0][0] == 69
    assert columns[1][0] - columns[0][0] == 8


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_smallest_pictures(layers):
    model = PatchDiscriminator(width=2, layers=layers).train()
    size = model.smallest_size
    logits = model(pictures(size, batch=1))
    assert logits.shape == (1, 1, 1, 1) and logits.isfinite().all()  # BatchNorm still has several values
    with pytest.raises(UserError, match=rf"{size}×{size - 1}.*at least"):
        model(pictures(size)[..., :-1])


@pytest.mark.parametrize(("height", "width"), [(24, 31), (33, 40), (64, 48)])
def test_number_of_patches(small, height, width):
    assert small(torch.zeros(2, 3, height, width)).shape == (2, 1, height // 8 - 2, width // 8 - 2)


def test_losses_by_hand():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.0, 0.5])
    torch.testing.assert_close(hinge_loss(real, fake), torch.tensor(0.5 * ((0 + 0.5 + 2) / 3 + (0 + 1 + 1.5) / 3)))
    torch.testing.assert_close(generator_loss(fake), torch.tensor(2.5 / 3))
    assert hinge_loss(torch.full((4,), 1.5), torch.full((4,), -1.5)) == 0  # beyond the margin nothing is to be won
    assert hinge_loss(torch.zeros(4), torch.zeros(4)) == 1  # knows nothing


def test_losses_pull_the_right_way():
    real, fake = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    hinge_loss(real, fake).backward()
    assert (real.grad < 0).all() and (fake.grad > 0).all()
    logits = torch.zeros(2, requires_grad=True)
    generator_loss(logits).backward()
    assert (logits.grad < 0).all()


def test_adaptive_weight_by_hand():
    reference, gradient = torch.tensor([[3.0, 4.0]]), torch.tensor([0.6, 0.0, 0.8])
    torch.testing.assert_close(adaptive_weight(reference, gradient, 1e4), torch.tensor(5 / 1.0001))
    assert adaptive_weight(reference, gradient, 2.0) == 2
    torch.testing.assert_close(adaptive_weight(reference, torch.zeros(3), 1e8), torch.tensor(5e4))
    assert adaptive_weight(torch.zeros(3), torch.zeros(3), 1e4) == 0
    half = adaptive_weight(torch.full((100,), 1e4).half(), torch.ones(100).half(), 1e8)  # squares beyond fp16's range
    torch.testing.assert_close(half, torch.tensor(1e5 / 10.0001))
    assert not adaptive_weight(reference.requires_grad_(), gradient.requires_grad_(), 1e4).requires_grad


def test_float32_inside_an_autocast_region(small):
    x = pictures()
    expected = small.eval()(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert small(x).dtype == torch.bfloat16
        with torch.autocast("cpu", enabled=False):
            torch.testing.assert_close(small(x), expected, rtol=0, atol=0)


def test_it_learns_to_tell_and_teaches():
    """Bright against dark pictures: the discriminator's loss falls, and its gradient shows how to look real."""
    torch.manual_seed(0)
    model = PatchDiscriminator(width=4).train()
    optimizer = torch.optim.Adam(model.parameters(), 2e-3, betas=(0.5, 0.9))
    real, fake = pictures() * 0.3 + 0.5, pictures(seed=1) * 0.3 - 0.5
    losses = []
    for _ in range(40):
        loss = hinge_loss(model(real), model(fake))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
