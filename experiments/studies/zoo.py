"""``python -m experiments zoo``: every recipe on one network of every kind that libraries have.

Of each module of timm the smallest classifier, and the smallest with each kind of norm layer in
that module; all classifiers of torchvision. Weights are random, images as small as the network
takes. A recipe either adapts (finite logits of the model's shape, what should move has moved, the
model comes back bit for bit) or refuses for a reason that the documentation has. Results are lines
of a file, and what is there is not measured again. Small networks come first; methods that train
all weights took up to 45 GB of memory, swap included, with those of 600 million parameters.
"""

from __future__ import annotations

import argparse
import json
import re
import warnings
from collections.abc import Iterable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, nn

import tta
from experiments.records import markdown
from experiments.records.progress import Progress
from tta.core.checks import told
from tta.core.classifier import find_classifier
from tta.core.files import replacing
from tta.core.norm_layers import batch_norm_layers
from tta.core.parameters import is_norm
from tta.core.registry import component
from tta.core.state_dict import checksum

__all__ = ["REASONS", "Zoo", "add_flags", "candidates", "examine", "render_zoo"]

SIZES = (32, 64, 96, 128, 160, 192, 224, 240, 256, 288, 299, 320, 384, 448, 512, 518)
RESULTS = Path(__file__).parents[1] / "results" / "zoo.jsonl"
BATCH = 2
# Where all weights are trained: untrained ones, normalised by two values, have gradients without
# bounds, and Adam's steps do not depend on their size.
GENTLE = {"optimizer": "adam", "lr": 1e-5, "nesterov": False}

ADAPTS = "adapts"  # what is said of a recipe that works

# Why a recipe may refuse a network, by what its sentence says.
REASONS = {
    "no BatchNorm": r"`norm`=.* must find BatchNorm layers",
    "no statistics": r"`norm`=.* must find running statistics",
    "nothing to train": r"`params`=.* must match at least one parameter",
    "all left out": r"`params`=.* must leave .* something to train",
    "no classifier": r"`model` must (be a classifier|have a classifier|return logits of shape)",
    "several outputs": r"`model` must return one tensor",
    "no second derivative": r"`source` must have a consistency .* no second derivative",
    "no denoiser": r"`source` must give .* its denoiser",
    "no plain convolution": r"`model` must begin with a plain nn.Conv2d",
    "no stages": r"`blocks` must name",
    "no linear head": r"`model` must make its logits by a linear layer|no linear layer for its",
    "no class token": r"`model` must be a vision transformer with a class token",
    "no blocks": r"`model` must have blocks for",
}

# Thresholds that random weights pass, and as little work as shows that all of it runs.
LOOSE: dict[str, dict[str, Any]] = {
    "norm": {},
    "update": {
        "entropy_margin": 1.01,  # no entropy is above ln C
        "redundancy_margin": 10.0,
        "confidence_threshold": 10.0,
        "views": 2,
        "population": 3,
        "warmup_samples": 0,
        "posterior_epochs": 2,
        "reset_threshold": 0.0,
        "plpd_threshold": -1.0,
        "update_every": BATCH,
    },
    "output": {"confidence_threshold": 0.0, "views": 2},
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Say what ``zoo`` does and takes."""
    parser.description = (
        "Wrap a random network of every module of timm, every kind of norm layer and "
        "every classifier of torchvision with every recipe; resumes where its file ends."
    )
    add = parser.add_argument
    add(
        "--output",
        type=Path,
        default=RESULTS,
        help="results, a line for each network (default: %(default)s)",
    )
    add("--match", default="*", help="networks by name, such as 'timm:res*' (default: all)")
    add("--recipes", nargs="+", default=[], metavar="NAME", help="default: all components")
    add("--page", type=Path, help="also write the results as a Markdown page")
    add("--quiet", action="store_true", help="print only the totals")
    parser.set_defaults(
        prepare=lambda args: Zoo(args.output, args.match, args.recipes, args.page, args.quiet)
    )


class Zoo:
    """Examines networks one by one; checked when it is made, done by `execute`.

    Args:
        output: JSON-lines file, a line for each network; read first and appended to.
        match: Only networks whose name, such as ``timm:resnet18``, fits this pattern.
        recipes: Names as `tta.wrap` takes them; default all components.
        page: Where the results go as a Markdown page, if anywhere.
        quiet: Print nothing but the totals.
    """

    def __init__(
        self,
        output: Path,
        match: str = "*",
        recipes: Sequence[str] = (),
        page: Path | None = None,
        quiet: bool = False,
    ) -> None:
        for recipe in recipes:
            tta.get_config(recipe)
        self.output, self.match, self.page, self.quiet = output, match, page, quiet
        self.recipes = tuple(recipes) or tuple(tta.list_methods())

    def execute(self) -> list[dict[str, Any]]:
        """Examine what the file does not have yet; returns all its lines."""
        results = _read(self.output)
        everything = candidates(self.output.with_suffix(".names.json"))
        names = [name for name in everything if self._wanted(name)]
        progress = Progress(len(names), self.quiet)
        self.output.parent.mkdir(parents=True, exist_ok=True)
        for name in names:
            done = results.get(name, {"recipes": {}})["recipes"]
            if missing := [r for r in self.recipes if r not in done]:
                line = examine(name, missing)
                with self.output.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                results[name] = line | {"recipes": done | line["recipes"]}
            progress.advance(1, name)
        progress.clear()
        lines = list(results.values())
        print(_totals(lines), flush=True)
        if self.page is not None:
            text = render_zoo(lines, [n for n in everything if n not in results])
            with replacing(self.page) as part:
                part.write_text(text)
        return lines

    def _wanted(self, name: str) -> bool:
        return fnmatch(name, self.match)


def candidates(cache: Path | None = None) -> list[str]:
    """Names of the networks, small ones first, from a file if it is there."""
    if cache is not None and cache.is_file():
        return json.loads(cache.read_text())
    smallest: dict[tuple[str, str], tuple[int, str]] = {}
    for name in timm.list_models():
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            net = timm.create_model(name)
        for kind in ("", *{type(m).__name__ for m in net.modules() if _norm_like(m)}):
            key, found = (type(net).__module__, kind), (_parameters(net), f"timm:{name}")
            smallest[key] = min(smallest.get(key, found), found)
    found = set(smallest.values())
    for name in torchvision.models.list_models(module=torchvision.models):
        weights = next(iter(torchvision.models.get_model_weights(name)))
        found.add((weights.meta["num_params"], f"torchvision:{name}"))
    names = [name for _, name in sorted(found)]
    if cache is not None:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with replacing(cache) as part:
            part.write_text(json.dumps(names, indent=1) + "\n")
    return names


def _parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def _norm_like(module: nn.Module) -> bool:
    """As `is_norm`, and those without affine parameters."""
    leaf = next(module.children(), None) is None
    return is_norm(module) or (leaf and "Norm" in type(module).__name__)


def examine(name: str, recipes: Iterable[str]) -> dict[str, Any]:
    """What every recipe does with one network.

    Args:
        name: ``timm:NAME`` or ``torchvision:NAME``.
        recipes: Names as `tta.wrap` takes them.

    Returns:
        ``model``, ``size`` of the images, ``norms`` by kind, and ``recipes``: for each "adapts", a
        key of `REASONS`, or another sentence, which is a fault.
    """
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net, size = _smallest(name)
        line: dict[str, Any] = {"model": name, "size": size, "norms": _norms(net), "recipes": {}}
        _give_the_head_weights(net)
        _give_statistics(net, size)
        before = _checksums(net.state_dict())
        for recipe in recipes:
            line["recipes"][recipe] = _try(net, size, recipe, before)
    return line


def _checksums(state: dict[str, Tensor]) -> list[tuple[Any, ...]]:
    """What shows a change of any bit, without a second copy of a network of 600 M parameters."""
    return [(n, v.dtype, tuple(v.shape), checksum([v])) for n, v in state.items()]


def _trains_all(recipe: str) -> bool:
    """Whether more than norm layers is trained."""
    return getattr(tta.get_config(recipe), "params", "norm") != "norm"


def _make(name: str, size: int | None) -> nn.Module:
    """With random weights, in eval mode; made for images of `size` if one is given.

    Raises:
        TypeError: When it is given for a network that does not let it be chosen.
    """
    library, _, rest = name.partition(":")
    if library == "torchvision":
        chosen: dict[str, Any] = {} if size is None else {"image_size": size}
        return torchvision.models.get_model(rest, weights=None, num_classes=10, **chosen).eval()
    chosen = {} if size is None else {"img_size": size}
    return timm.create_model(rest, num_classes=10, **chosen).eval()


def _smallest(name: str) -> tuple[nn.Module, int]:
    """The network with the smallest image that it takes."""
    net, error = _make(name, None), None
    for size in SIZES:
        try:
            if not _takes(net, size):
                net = _make(name, size)
                if not _takes(net, size):
                    continue
            return net, size
        except Exception as problem:  # whatever a library raises on a size that it cannot make
            error, net = problem, _make(name, None)
    raise RuntimeError(f"{name} takes no square image up to {SIZES[-1]}: {told(error)}")


def _takes(net: nn.Module, size: int) -> bool:
    try:
        with torch.no_grad():
            logits = net(_images(0, size))
    except Exception:  # whatever a network raises on a size that it does not take
        return False
    return not isinstance(logits, Tensor) or bool(logits.isfinite().all())


def _images(seed: int, size: int) -> Tensor:
    return torch.rand(BATCH, 3, size, size, generator=torch.Generator().manual_seed(seed))


def _norms(net: nn.Module) -> dict[str, int]:
    found: dict[str, int] = {}
    for module in net.modules():
        if _norm_like(module):
            kind = type(module).__name__
            found[kind] = found.get(kind, 0) + 1
    return found


def _give_the_head_weights(net: nn.Module) -> None:
    """Many libraries start the classifier at zero, where every gradient is zero too."""
    for module in find_classifier(net).modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.normal_(module.weight, 0.0, 0.05)


def _give_statistics(net: nn.Module, size: int) -> None:
    """Running statistics of an untrained network are not those of its activations.

    Deep ones would fade to nothing or overflow with them.
    """
    layers: list[Any] = list(batch_norm_layers(net).values())
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.momentum = 1.0
        layer.train()
    if layers:
        with torch.no_grad():
            net(torch.cat([_images(50 + i, size) for i in range(4)]))
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
        layer.eval()


def _try(net: nn.Module, size: int, recipe: str, before: list[tuple[Any, ...]]) -> str:
    flags = [(m, m.training) for m in net.modules()]
    try:
        said = _adapt(net, size, recipe)
    except (ValueError, TypeError) as refusal:
        text = str(refusal)
        said = next((r for r, words in REASONS.items() if re.search(words, text)), text)
    except Exception as fault:
        said = f"{type(fault).__name__}: {fault}".splitlines()[0][:300]
    if _checksums(net.state_dict()) != before:
        return "not given back bit for bit"
    if flags != [(m, m.training) for m in net.modules()]:
        return "not given back with its flags"
    return said


def _adapt(net: nn.Module, size: int, recipe: str) -> str:
    config, loose = tta.get_config(recipe), LOOSE.get(component(recipe).slot, {})
    fields = {k: v for k, v in loose.items() if k in config.to_dict()}
    if _trains_all(recipe):
        fields |= GENTLE
    labels = torch.arange(20).remainder(10).split(BATCH)  # every class twice
    batches = [(_images(100 + i, size), y) for i, y in enumerate(labels)]
    adapter = tta.wrap(
        net,
        config.replace(**fields) if fields else recipe,
        source=_source(net, batches, "posterior_epochs" in fields),
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
    )
    try:
        with torch.no_grad():
            before = _figures(adapter)
            for seed in range(2):
                logits = adapter(_images(seed, size))
                if logits.shape != (BATCH, 10) or not logits.isfinite().all():
                    return "logits are not finite"
            after = _figures(adapter)
        # Behind layer scales of 1e-5 it may be momentum alone that moves.
        rests = getattr(component(recipe), "episodic", False)  # parameters are put back
        rests |= getattr(component(recipe), "learns_apart", False)  # an update would move it
        return ADAPTS if after != before or not before or rests else "nothing moved"
    finally:
        adapter.unwrap()


def _figures(adapter: tta.Adapter) -> list[tuple[Any, ...]]:
    """Checksums of a state but for its generator, by values: -0 is 0, and NaN is NaN."""
    state = {name: value for name, value in adapter.state().items() if name != "rng"}
    for value in state.values():
        if value.is_floating_point():
            value.nan_to_num_().add_(0.0)
    return _checksums(state)


def _source(net: nn.Module, batches: Any, posterior: bool) -> tta.SourceStatistics:
    """Batches, and a posterior where a method would train one for hours."""
    if not posterior:
        return tta.SourceStatistics(batches=batches)
    mean = {n: p.detach() for n, p in net.named_parameters()}
    variance = {n: p.new_full((), 1e-4).expand_as(p) for n, p in mean.items()}
    return tta.SourceStatistics(batches=batches, posterior_mean=mean, posterior_variance=variance)


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """The results by network, put together of all lines; a half-written last one is cut off."""
    results: dict[str, dict[str, Any]] = {}
    text = path.read_text() if path.is_file() else ""
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        with replacing(path) as part:
            part.write_text(whole)
    for line in map(json.loads, whole.splitlines()):
        done = results.get(line["model"], {"recipes": {}})["recipes"]
        results[line["model"]] = line | {"recipes": done | line["recipes"]}
    return results


def _outcomes(lines: Sequence[dict[str, Any]]) -> list[str]:
    return [said for line in lines for said in line["recipes"].values()]


def _totals(lines: Sequence[dict[str, Any]]) -> str:
    said = _outcomes(lines)
    refused = {reason: said.count(reason) for reason in REASONS if reason in said}
    faults = len(said) - said.count(ADAPTS) - sum(refused.values())
    parts = [f"{said.count(ADAPTS)} adapt", *(f"{n} refuse ({r})" for r, n in refused.items())]
    return f"{len(lines)} networks, {len(said)} runs: {', '.join(parts)}, {faults} unexplained"


def render_zoo(lines: Sequence[dict[str, Any]], left: Sequence[str] = ()) -> str:
    """The lines as a Markdown page: a row for each network, a column for each recipe.

    Args:
        lines: Results by network.
        left: Networks that wait to be measured.
    """
    recipes = list(dict.fromkeys(r for line in lines for r in line["recipes"]))
    letters = {reason: chr(ord("a") + i) for i, reason in enumerate(REASONS)}
    rows = []
    for line in sorted(lines, key=lambda line: line["model"]):
        norms = ", ".join(f"{count} {kind}" for kind, count in line["norms"].items()) or "none"
        cells = [line["recipes"].get(r, "-") for r in recipes]
        shown = ["+" if c == ADAPTS else letters.get(c, markdown.strong(c)) for c in cells]
        rows.append([line["model"], str(line["size"]), norms, *shown])
    shown = markdown.table(
        ["network", "size", "norm layers", *recipes], rows, "lrl" + "c" * len(recipes)
    )
    told = "`+` adapts; refused: " + ", ".join(f"`{v}` {k}" for k, v in letters.items())
    legend = [told + ("; `-` not run yet" if any("-" in row[3:] for row in rows) else ""), ""]
    written = markdown.note("Written by `python -m experiments zoo --page`.")
    head = [markdown.heading("Networks"), "", written, ""]
    about = (__doc__ or "").partition("\n\n")[2].strip()
    waiting = [f"Not measured yet ({len(left)}): {', '.join(left)}.", ""] if left else []
    totals = _totals(lines) + "."
    return markdown.document([*head, about, "", totals, "", *waiting, *legend, *shown])
