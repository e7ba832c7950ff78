"""Train a small residual network in PyTorch before and after `numbanorm.torch.convert`.

    python torch_cnn.py [--epochs 6] [--batch-size 64] [--width 16] [--size 32] [--seed 0]
    python torch_cnn.py --benchmark

The data are the 1,797 digits that come with scikit-learn, scaled up; a quarter of them is held
out. Both networks start from the same weights and see the same batches. They take turns, step by
step, together with a third one that has no norm layers: what a step takes longer than there is
the time of normalisation.

With --benchmark, the network is four blocks of Conv3x3, norm and ReLU, 32 to 128 channels, on
random images of 32x3x32x32: BatchNorm of PyTorch and of numbanorm, and SwitchableNorm written
plainly in PyTorch, as its authors write it, and of numbanorm.
"""

import argparse
import copy
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

import numbanorm.torch

# Distinct to colour-blind readers too (Okabe and Ito).
COLOURS = {"torch.nn": "#e69f00", "numbanorm.torch": "#0072b2"}


class Residual(nn.Module):
    """Two convolutions, and the input added to what they make of it."""

    def __init__(self, channels, out, stride):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, out, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU(),
            nn.Conv2d(out, out, 3, padding=1, bias=False),
            nn.BatchNorm2d(out),
        )
        self.skip = nn.Identity()
        if stride > 1 or channels != out:
            self.skip = nn.Sequential(
                nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out)
            )

    def forward(self, x):
        """Return the sum, rectified."""
        return F.relu(self.body(x) + self.skip(x))


def residual_network(width):
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        Residual(width, width, 1),
        Residual(width, 2 * width, 2),
        Residual(2 * width, 4 * width, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * width, 10),
    )


def plain_network(channels=(32, 64, 96, 128)):
    layers = []
    for before, after in zip((3, *channels), channels, strict=False):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels[-1], 10)
    )


class PlainSwitchableNorm2d(nn.Module):
    """SwitchableNorm as its definition reads, without running statistics."""

    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(channels, 1, 1))
        self.mean_weight = nn.Parameter(torch.ones(3))
        self.var_weight = nn.Parameter(torch.ones(3))

    def statistics(self, x):
        """Return the means and variances of instances, layers and the batch."""
        axes = (2, 3), (1, 2, 3), (0, 2, 3)
        means = [x.mean(a, keepdim=True) for a in axes]
        return means, [x.var(a, correction=0, keepdim=True) for a in axes]

    def forward(self, x):
        """Return x normalised with the mixture of the statistics."""
        means, variances = self.statistics(x)
        mean = sum(p * m for p, m in zip(self.mean_weight.softmax(0), means, strict=True))
        var = sum(p * v for p, v in zip(self.var_weight.softmax(0), variances, strict=True))
        return (x - mean) / (var + 1e-5).sqrt() * self.weight + self.bias


class AuthorsSwitchableNorm2d(PlainSwitchableNorm2d):
    """The same as its authors write it: layers and the batch from the instances' statistics."""

    def statistics(self, x):
        """Return the means and variances of instances, layers and the batch."""
        mean, var = x.mean((2, 3), keepdim=True), x.var((2, 3), correction=0, keepdim=True)
        square = var + mean**2
        means = [mean, mean.mean(1, keepdim=True), mean.mean(0, keepdim=True)]
        squares = [square, square.mean(1, keepdim=True), square.mean(0, keepdim=True)]
        return means, [s - m**2 for s, m in zip(squares, means, strict=True)]


def replace_norms(module, make):
    """Put `make(channels)` into the place of each BatchNorm; return the module."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, make(child.num_features))
        else:
            replace_norms(child, make)
    return module


class Trainer:
    """A network and its optimiser; `losses` and `seconds` have one entry for each step."""

    def __init__(self, model, rate):
        self.model = model
        self.optimiser = torch.optim.SGD(model.parameters(), rate, momentum=0.9)
        self.losses, self.seconds = [], []

    def step(self, images, labels, rate=None):
        """Train on one batch, and note the loss and how long it took."""
        start = perf_counter()
        if rate is not None:
            self.optimiser.param_groups[0]["lr"] = rate
        self.optimiser.zero_grad()
        loss = F.cross_entropy(self.model(images), labels)
        loss.backward()
        self.optimiser.step()
        self.losses.append(loss.item())
        self.seconds.append(perf_counter() - start)

    @torch.no_grad()
    def accuracy(self, images, labels):
        """Return the share of images that the network, in evaluation, is right about."""
        self.model.eval()
        parts = [self.model(batch).argmax(1) for batch in images.split(256)]
        return (torch.cat(parts) == labels).float().mean().item()


def take_turns(trainers, *batch, rates=None):
    """Let each network do one step; who is first changes, as what runs before has an effect."""
    names = list(trainers)
    first = len(trainers[names[0]].seconds) % len(names)
    for name in names[first:] + names[:first]:
        trainers[name].step(*batch, None if rates is None else rates[name])


def warm_up(model, images, labels):
    """Let Numba compile what a step needs."""
    Trainer(copy.deepcopy(model), 0.0).step(images, labels)


def added(trainers, name, without):
    """Return how many seconds longer a step is, the median over all turns."""
    return np.median(np.subtract(trainers[name].seconds, trainers[without].seconds))


def median(trainers, name):
    return np.median(trainers[name].seconds)


# -- Digits --------------------------------------------------------------------------------------


def digits(size, seed):
    """Return images and labels for training, then for testing."""
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images.reshape(-1, 1, 8, 8) / 16, dtype=torch.float32)
    images = F.interpolate(images, size=size, mode="bilinear")
    train, test = train_test_split(
        np.arange(len(labels)), test_size=0.25, stratify=labels, random_state=seed
    )
    labels = torch.tensor(labels)
    return images[train], labels[train], images[test], labels[test]


def train(args):
    """Train both networks; return them with the one that has no norms, and a row for each."""
    images, labels, test_images, test_labels = digits(args.size, args.seed)
    torch.manual_seed(args.seed)
    model = residual_network(args.width)
    models = {
        "torch.nn": model,
        "numbanorm.torch": numbanorm.torch.convert(copy.deepcopy(model)),
        "without": replace_norms(copy.deepcopy(model), lambda channels: nn.Identity()),
    }
    for network in models.values():
        warm_up(network, images[: args.batch_size], labels[: args.batch_size])
    trainers = {name: Trainer(network, 0.0) for name, network in models.items()}
    batches = -(-len(images) // args.batch_size)
    steps = args.epochs * batches
    generator = np.random.default_rng(args.seed)
    with tqdm(total=steps, unit="step") as progress:
        for _ in range(args.epochs):
            for batch in np.array_split(generator.permutation(len(images)), batches):
                rate = 0.02 * (1 - progress.n / steps)
                # Without norms the network would not bear the rate; only its time is wanted.
                rates = {"torch.nn": rate, "numbanorm.torch": rate, "without": 0.0}
                take_turns(trainers, images[batch], labels[batch], rates=rates)
                progress.update()
    rows = {}
    for name in COLOURS:
        seconds, norm = median(trainers, name), added(trainers, name, "without")
        accuracy = trainers[name].accuracy(test_images, test_labels)
        loss = np.mean(trainers[name].losses[-batches:])
        rows[name] = accuracy, loss, 1e3 * seconds, 1e3 * norm, norm / seconds
    return trainers, rows


def table(rows):
    lines = ["                     test    final   a step    of it in"]
    lines += ["norm layers      accuracy     loss       ms    norms, ms    share"]
    for name, row in rows.items():
        lines.append("{:<16}{:>9.4f}{:>9.4f}{:>9.1f}{:>13.1f}{:>9.0%}".format(name, *row))
    return "\n".join(lines)


def plot(trainers, rows, path):
    # Not pyplot: a figure of its own needs no display.
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for name, width, style in (("torch.nn", 4, "-"), ("numbanorm.torch", 1.5, "--")):
        losses = trainers[name].losses
        steps = np.arange(1, len(losses) + 1)
        left.semilogy(steps, losses, style, color=COLOURS[name], linewidth=width, label=name)
    left.set(title="The same training", xlabel="step", ylabel="cross-entropy of the batch")
    left.legend(frameon=False)
    names = list(rows)
    total, norm = (np.array([row[k] for row in rows.values()]) for k in (2, 3))
    right.barh(names, total - norm, color="#bbbbbb", label="all else")
    right.barh(names, norm, left=total - norm, color=[COLOURS[n] for n in names])
    for name, milliseconds, share in zip(names, total, norm / total, strict=True):
        right.text(milliseconds, name, f" {share:.0%}", va="center")
    right.set(title="A step, and the norm layers in it", xlabel="milliseconds")
    right.margins(x=0.15)
    right.invert_yaxis()
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


# -- Benchmark -----------------------------------------------------------------------------------


def benchmark(args):
    """Print how long each network's step is; return the figures that matter."""
    torch.manual_seed(args.seed)
    images, labels = torch.randn(32, 3, 32, 32), torch.randint(10, (32,))
    model, ours = plain_network(), numbanorm.torch
    norms = {
        "BatchNorm": {"PyTorch": nn.BatchNorm2d, "numbanorm": ours.BatchNorm2d},
        "SwitchableNorm": {
            "plain PyTorch": PlainSwitchableNorm2d,
            "as its authors": AuthorsSwitchableNorm2d,
            "numbanorm": ours.SwitchableNorm2d,
        },
    }
    print(f"{torch.get_num_threads()} threads, {args.steps} rounds, medians")
    print(f"{'':<32}{'a step, ms':>12}{'added, ms':>12}")
    results = {}
    # Not all at once: memory that a plain SwitchableNorm leaves behind spares others fresh pages.
    for norm, makers in norms.items():
        makers = {"no norm": lambda channels: nn.Identity()} | makers
        trainers = {}
        for name, make in makers.items():
            network = replace_norms(copy.deepcopy(model), make)
            warm_up(network, images, labels)
            trainers[name] = Trainer(network, 0.01)
        for _ in tqdm(range(args.steps), unit="round"):
            take_turns(trainers, images, labels)
        step = {name: median(trainers, name) for name in makers}
        extra = {name: added(trainers, name, "no norm") for name in makers}
        for name in makers:
            print(f"{f'{norm}, {name}':<32}{1e3 * step[name]:>12.1f}{1e3 * extra[name]:>12.1f}")
        mine, theirs = "numbanorm", list(makers)[1]
        results[f"what {norm} adds, {mine} / {theirs}"] = extra[mine] / extra[theirs]
        results[f"a step with {norm}, {mine} / {theirs}"] = step[mine] / step[theirs]
        expected, found = (np.array(trainers[name].losses) for name in (theirs, mine))
        results[f"losses, {norm}"] = (np.abs(found - expected) / expected).max()
    for what, figure in results.items():
        print(f"{what}: {figure:.1e}" if what.startswith("losses") else f"{what}: {figure:.3f}")
    return results


def positive(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--benchmark", action="store_true", help="measure, on random images")
    parser.add_argument("--steps", type=positive, default=50, help="of --benchmark, default: 50")
    parser.add_argument("--epochs", type=positive, default=6, help="default: 6")
    parser.add_argument("--batch-size", type=positive, default=64, help="default: 64")
    parser.add_argument("--width", type=positive, default=16, help="channels, default: 16")
    parser.add_argument("--size", type=positive, default=32, help="of an image, default: 32")
    parser.add_argument("--threads", type=positive, help="default: as PyTorch has it")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("torch_cnn.png"),
        help="where the figure goes, default: torch_cnn.png",
    )
    args = parser.parse_args(argv)
    if args.threads is not None:
        torch.set_num_threads(args.threads)  # numbanorm follows
    if args.benchmark:
        return benchmark(args)
    trainers, rows = train(args)
    print(table(rows))
    plot(trainers, rows, args.output)
    print(f"Figure: {args.output}")
    return trainers


if __name__ == "__main__":
    main()
