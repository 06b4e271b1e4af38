"""Prompt tokens and blocks by structure: where they go, and which models are refused."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torchvision.models.vision_transformer import VisionTransformer

import tta
from tests.helpers.batches import images, source_batches
from tests.helpers.nets import tiny
from tta.core.outputs import LogitsReader
from tta.parts.blocks import find_blocks
from tta.parts.tokens import TokenPrompts, takes_prompts

pytestmark = pytest.mark.filterwarnings("ignore:.*preset, made for:UserWarning")
close = torch.testing.assert_close
create: Any = timm.create_model
SMALL: dict[str, Any] = {"depth": 2, "embed_dim": 16, "num_heads": 2, "num_classes": 10}


def timm_net(name: str, **more: Any) -> nn.Module:
    torch.manual_seed(0)
    size = {} if name.startswith("naflexvit") else {"img_size": 32, "patch_size": 8}
    net = create(name, **SMALL | size | more)
    with torch.no_grad():  # tables of relative positions and registers start at 0
        for p in net.parameters():
            p.add_(torch.randn(p.shape) * 0.1)
    return net.eval()


def torchvision_net(**more: Any) -> nn.Module:
    torch.manual_seed(0)
    net: Any = VisionTransformer(32, 8, 3, 2, 16, 32, num_classes=10, **more)
    nn.init.normal_(net.heads[-1].weight)
    return net.eval()


def _by_hand(net: Any, x: Tensor, prompts: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits, and class tokens through the following norm, of a model written out."""
    if isinstance(net, VisionTransformer):
        x = net._process_input(x)
        x = torch.cat([net.class_token.expand(len(x), -1, -1), x], 1) + net.encoder.pos_embedding
        blocks: list[Any] = list(net.encoder.layers)
        norm, head = net.encoder.ln, net.heads
        norms = [block.ln_1 for block in blocks[1:]]
    else:
        x = net.norm_pre(net._pos_embed(net.patch_embed(x)))
        blocks, norm, head = list(net.blocks), net.norm, net.head
        norms = [block.norm1 for block in blocks[1:]]
    x = torch.cat([x[:, :1], prompts.expand(len(x), -1, -1), x[:, 1:]], 1)
    tokens = []
    for block, following in zip(blocks, [*norms, norm], strict=True):
        x = block(x)
        tokens.append(following(x)[:, 0])
    return head(tokens[-1]), tokens


RIGHT = {
    "timm": lambda: timm_net("vit_tiny_patch16_224"),
    "timm clip": lambda: timm_net("vit_base_patch16_clip_224"),
    "timm registers": lambda: timm_net("vit_small_patch14_reg4_dinov2"),
    "timm deit3": lambda: timm_net("deit3_small_patch16_224"),
    "torchvision": torchvision_net,
}


@pytest.mark.parametrize("kind", RIGHT)
@torch.no_grad()
def test_a_pass_with_prompts_is_the_one_written_out(kind: str) -> None:
    net, x = RIGHT[kind](), images(0)
    prompts = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    assert takes_prompts(net)
    expected, tokens = _by_hand(net, x, prompts)
    plain = net(x)
    adapter = tta.wrap(net, "source", output="neo")  # for a network with features
    reader = TokenPrompts(adapter.network, "mine")
    reader.check(adapter.network)
    prediction, found = reader.run_reading(adapter.network, x, prompts)
    close(prediction.logits, expected)
    close(found, torch.stack(tokens))
    close(adapter.network(x).logits, plain)
    bare = reader.run_reading(adapter.network, x)[1]
    close(bare, torch.stack(_by_hand(net, x, prompts[:0])[1]))
    assert adapter.unwrap() is net
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in net.modules())


PATCHES = "its position 0 depends on the image"
OTHERS = "its classifier sees other tokens"
PLACES = "its blocks (tell positions apart|take sequences of one length alone)"
NONE = r"no blocks are found in it that pass on a sequence"
SHAPES = r"its blocks do not pass on one sequence"
# A small network of each kind in timm whose blocks work on tokens, and why it is refused.
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "vit_base_patch16_siglip_224": (PATCHES, {}),
    "vit_medium_patch16_gap_240": (PATCHES, {}),
    "vit_little_patch16_reg4_gap_256": (OTHERS, {}),
    "vit_base_patch16_224": (OTHERS, {"global_pool": "avg"}),
    "deit_tiny_distilled_patch16_224": (OTHERS, {}),
    "beit_base_patch16_224": (OTHERS, {}),
    "beit_base_patch16_384": (PLACES, {"global_pool": "token"}),
    "eva02_tiny_patch14_224": (PLACES, {"global_pool": "token"}),
    "vit_base_patch16_rope_224": (PLACES, {}),
    "vit_relpos_base_patch16_cls_224": (PLACES, {}),
    "vit_relpos_small_patch16_224": (PATCHES, {}),
    "cait_xxs24_224": (PATCHES, {}),
    "naflexvit_base_patch16_gap": (OTHERS, {}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_transformers_of_timm_are_refused_in_words(name: str) -> None:
    words, fields = REFUSED[name]
    net = timm_net(name, **fields)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(ValueError, match=f"`model` must be a vision transformer .*{words}"):
        tta.wrap(net, "foa", source=source_batches(), population=2)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in net.modules())


OTHER = [
    "swin_tiny_patch4_window7_224",
    "crossvit_tiny_240",
    "pit_ti_224",
    "resnet18",
    "mixer_s32_224",
    "convit_tiny",
    "xcit_nano_12_p16_224",
    "mobilevit_xxs",
]


@pytest.mark.parametrize("name", OTHER)
@pytest.mark.slow
def test_networks_without_one_sequence_of_tokens_are_refused(name: str) -> None:
    net = create(name, num_classes=10).eval()
    config: Any = net.pretrained_cfg
    x = torch.rand(2, *config["input_size"])
    with pytest.raises(ValueError, match=f"{NONE}|{SHAPES}|{PATCHES}|several stacks"):
        tta.wrap(net, "foa", source=[(x, torch.zeros(2).long())], population=2)


@pytest.mark.slow
def test_a_transformer_behind_a_convolutional_stem_takes_prompts() -> None:
    net = create("vit_small_r26_s32_224", num_classes=10, depth=2, embed_dim=16,
                            num_heads=2).eval()  # fmt: skip
    assert takes_prompts(net)


def test_a_model_without_blocks_is_refused() -> None:
    for net in (tiny("gn"), nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)).eval()):
        assert not takes_prompts(net)
        with pytest.raises(ValueError, match=NONE):
            tta.wrap(net, "foa", source=source_batches())


class Block(nn.Module):
    """A block that takes a keyword and gives a tuple."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *, states: Tensor) -> tuple[Tensor]:
        return (self.inner(states),)


class Foreign(nn.Module):
    """A transformer whose blocks lie side by side in the model itself."""

    def __init__(self) -> None:
        super().__init__()
        self.net: Any = tiny("ln")
        self.one, self.two = map(Block, self.net.blocks)
        self.net.blocks = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.net.norm_pre(self.net._pos_embed(self.net.patch_embed(x)))
        for block in (self.one, self.two):
            (x,) = block(states=x)
        return self.net.forward_head(self.net.norm(x))


def test_blocks_may_be_named() -> None:
    net = Foreign().eval()
    assert not takes_prompts(net)
    kinds: dict[str, Any] = {"source": source_batches(), "population": 4}
    named = tta.wrap(net, "foa", blocks=("two", "one"), **kinds)
    found = tta.wrap(tiny("ln"), "foa", **kinds)
    for t in range(2):
        close(named(images(t)), found(images(t)))
    config: Any = named.config.update
    assert config.blocks == ("two", "one")


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("blocks.0", "blocks.7"), "`blocks` must name modules of the model, got 'blocks.7'"),
        (("patch_embed",), "its blocks do not pass on one sequence|called once"),
        (("blocks.0.norm1", "blocks.0.attn.qkv"), "its blocks do not pass on one sequence"),
        ((), "`blocks` must name at least one module"),
        (("blocks.0", "blocks.0"), "each once"),
    ],
)
def test_wrong_names_of_blocks_are_refused(names: tuple[str, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        tta.wrap(tiny("ln"), "foa", source=source_batches(), blocks=names)


def test_blocks_are_found_where_modules_of_one_class_are_stacked() -> None:
    net = create("resnet18", num_classes=10).eval()
    found = find_blocks(net, LogitsReader())
    assert [b.name for b in found] == [f"layer{i}.{j}" for i in (1, 2, 3, 4) for j in (0, 1)]
    assert [b.given[1] for b in found] == [64, 64, 128, 128, 256, 256, 512, 512]
    assert not any(b.is_sequence for b in found)
    vit = find_blocks(torchvision_net(), LogitsReader())
    assert [b.norm for b in vit] == [f"{b.name}.ln_1" for b in vit] and len(vit) == 3
