"""Small networks of every kind that people prune, and how to make them hide nothing."""

from __future__ import annotations

import copy
import functools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stamp.groups import trace
from stamp.structure import ChannelGroups


def conv_bn(cin: int, cout: int, k: int = 3, stride: int = 1, groups: int = 1, act: bool = True) -> nn.Sequential:
    layers = [nn.Conv2d(cin, cout, k, stride, k // 2, groups=groups, bias=False), nn.BatchNorm2d(cout)]
    return nn.Sequential(*layers, nn.ReLU()) if act else nn.Sequential(*layers)


def vgg(widths=(6, "M", 8, 8, "M"), size=8, classes=5, hidden=12, bias=True) -> nn.Sequential:
    layers: list[nn.Module] = []
    channels = 3
    for width in widths:
        if width == "M":
            layers.append(nn.MaxPool2d(2))
            size //= 2
        else:
            layers += [
                nn.Conv2d(channels, width, 3, padding=1, bias=bias),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
            ]
            channels = width
    layers += [nn.Flatten()]
    features = channels * size * size
    if hidden:
        layers += [nn.Linear(features, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Dropout()]
        features = hidden
    return nn.Sequential(*layers, nn.Linear(features, classes))


class BasicBlock(nn.Module):
    def __init__(self, cin: int, cout: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(cout)
        self.conv2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(cout)
        self.down = conv_bn(cin, cout, 1, stride, act=False) if stride != 1 or cin != cout else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.down(x)
        return F.relu(out)


class Bottleneck(nn.Module):
    def __init__(self, cin: int, width: int, stride: int = 1, groups: int = 1, expansion: int = 4) -> None:
        super().__init__()
        cout = width * expansion
        self.body = nn.Sequential(
            conv_bn(cin, width, 1),
            conv_bn(width, width, 3, stride, groups=groups),
            conv_bn(width, cout, 1, act=False),
        )
        self.downsample = conv_bn(cin, cout, 1, stride, act=False) if stride != 1 or cin != cout else None

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        return torch.relu_(self.body(x) + identity)


class ResNet(nn.Module):
    def __init__(self, block="basic", width=4, depths=(2, 2, 2, 2), classes=5, groups=1) -> None:
        super().__init__()
        self.stem = conv_bn(3, width)
        layers: list[nn.Module] = []
        channels = width
        for k, depth in enumerate(depths):
            for j in range(depth):
                stride = 2 if k and not j else 1
                w = width * 2**k
                if block == "basic":
                    layers.append(BasicBlock(channels, w, stride))
                    channels = w
                else:
                    layers.append(Bottleneck(channels, w, stride, groups))
                    channels = 4 * w
        self.layers = nn.Sequential(*layers)
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(self.stem(x))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class PreAct(nn.Module):
    def __init__(self, c=6, classes=4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, c, 3, padding=1)
        self.bns = nn.ModuleList(nn.BatchNorm2d(c) for _ in range(5))
        self.convs = nn.ModuleList(nn.Conv2d(c, c, 3, padding=1) for _ in range(4))
        self.fc = nn.Linear(c, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for k in (0, 2):
            h = self.convs[k](self.bns[k](x).relu())
            x = x + self.convs[k + 1](self.bns[k + 1](h).relu())
        return self.fc(self.bns[4](x).relu().mean((2, 3)))


class DenseNet(nn.Module):
    def __init__(self, c=6, growth=4, classes=4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, c, 3, padding=1)
        self.blocks = nn.ModuleList()
        for k in range(5):
            cin = c + growth * (k if k < 3 else k - 3)
            self.blocks.append(nn.Sequential(nn.BatchNorm2d(cin), nn.ReLU(), nn.Conv2d(cin, growth, 3, padding=1)))
            if k == 2:
                self.transition = nn.Sequential(
                    nn.BatchNorm2d(c + 3 * growth), nn.ReLU(), nn.Conv2d(c + 3 * growth, c, 1)
                )
        self.norm = nn.BatchNorm2d(c + 2 * growth)
        self.fc = nn.Linear(c + 2 * growth, classes)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.stem(x)]
        for block in self.blocks[:3]:
            parts.append(block(torch.cat(parts, 1)))
        x = F.avg_pool2d(self.transition(torch.cat(parts, 1)), 2)
        for block in self.blocks[3:]:
            x = torch.cat([x, block(x)], dim=1)
        return self.fc(F.relu(self.norm(x)).mean(dim=[-2, -1]))


class InvertedResidual(nn.Module):
    def __init__(self, cin: int, cout: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = cin * expand
        self.use_res = stride == 1 and cin == cout
        self.conv = nn.Sequential(
            nn.Conv2d(cin, hidden, 1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(),
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=True),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(),
            nn.Conv2d(hidden, cout, 1, bias=False),
            nn.BatchNorm2d(cout),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.use_res else self.conv(x)


def mobilenet() -> nn.Sequential:
    return nn.Sequential(
        conv_bn(3, 4),
        InvertedResidual(4, 6, 2, 2),
        InvertedResidual(6, 6, 1, 3),
        conv_bn(6, 10, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(10, 4),
    )


class SqueezeExcite(nn.Module):
    def __init__(self, c=8) -> None:
        super().__init__()
        self.stem = conv_bn(3, c)
        self.reduce = nn.Conv2d(c, 4, 1)
        self.expand = nn.Conv2d(4, c, 1)
        self.attend = nn.Conv2d(c, 1, 3, padding=1)
        self.head = nn.Conv2d(c, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        s = x.mean((2, 3), keepdim=True)
        x = x * torch.sigmoid(self.expand(F.silu(self.reduce(s))))
        x = x * self.attend(x).sigmoid()
        return self.head(x).flatten(2).mean(-1)


def group_norm() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1),
        nn.GroupNorm(4, 12),
        nn.PReLU(12),
        nn.Conv2d(12, 8, 3, padding=1),
        nn.InstanceNorm2d(8, affine=True),
        nn.GELU(),
        nn.Conv2d(8, 6, 3),
        nn.GroupNorm(1, 6),
        nn.Flatten(),
        nn.Linear(6 * 36, 3),
    )


class Attention(nn.Module):
    """Attention as timm writes it, with sizes that follow from attributes."""

    def __init__(self, dim: int, heads: int, fused: bool, hard: bool = False) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.fused, self.hard = heads, dim // heads, fused, hard
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused:
            x = F.scaled_dot_product_attention(q, k, v)
        else:
            x = ((q * self.head_dim**-0.5) @ k.transpose(-2, -1)).softmax(dim=-1) @ v
        x = x.transpose(1, 2).reshape(b, n, c if self.hard else self.num_heads * self.head_dim)
        return self.proj(x)


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, kind: str) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.kind = kind
        self.attn = (
            nn.MultiheadAttention(dim, heads, batch_first=True)
            if kind == "torch"
            else Attention(dim, heads, kind == "fused", kind == "hard")
        )
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Dropout(0.1), nn.Linear(2 * dim, dim))
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        h = self.attn(h, h, h, need_weights=False)[0] if self.kind == "torch" else self.attn(h)
        x = x + self.scale * h
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    def __init__(self, kind="torch", dim=16, heads=4, depth=2, classes=4) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, dim, 4, 4)
        self.cls = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos = nn.Parameter(torch.randn(1, 5, dim) * 0.02)
        self.blocks = nn.Sequential(*(Block(dim, heads, kind) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1) + self.pos
        return self.head(self.norm(self.blocks(x))[:, 0])


class NormFreeViT(nn.Module):
    """Tokens without LayerNorm, so that the embedding itself can be cut: with bare parameters on its axis."""

    def __init__(self, dim=12, heads=3) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, dim, 4, 4)
        self.cls = nn.Parameter(torch.randn(1, 1, dim))
        self.pos = nn.Parameter(torch.randn(1, 5, dim))
        self.gamma = nn.Parameter(torch.randn(dim))
        self.attn = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.head = nn.Linear(dim, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1) + self.pos
        x = x + self.gamma * self.attn(x, x, x)[0]
        return self.head(x.mean(1))


class UNet(nn.Module):
    def __init__(self, c=4) -> None:
        super().__init__()
        self.down1, self.down2, self.mid = conv_bn(3, c), conv_bn(c, 2 * c), conv_bn(2 * c, 2 * c)
        self.up2 = nn.ConvTranspose2d(2 * c, c, 2, 2)
        self.dec2 = conv_bn(3 * c, c)
        self.dec1 = conv_bn(2 * c, c)
        self.out = nn.Conv2d(c, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.down1(x)
        b = self.down2(F.max_pool2d(a, 2))
        y = self.mid(F.max_pool2d(b, 2))
        y = self.dec2(torch.cat([self.up2(y), b], 1))
        y = torch.cat([F.interpolate(y, scale_factor=2, mode="bilinear"), a], 1)
        return self.out(self.dec1(y))


class NestedCat(nn.Module):
    """Inception-like: concatenations of concatenations, flattened, and added to another tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 5, 1)
        self.d = nn.Conv2d(3, 12, 1)
        self.norm = nn.BatchNorm2d(12)
        self.fc = nn.Linear(12 * 64, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([torch.cat([self.a(x), self.b(x)], 1), self.c(x)], 1)
        return self.fc(torch.flatten(F.relu(self.norm(y + self.d(x))), 1))


class Encoder(nn.Module):
    def __init__(self, norm_first=True) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 8)
        layer = nn.TransformerEncoderLayer(8, 4, 12, batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x.flatten(2).transpose(1, 2))).mean(1))


class ConvNeXt(nn.Module):
    def __init__(self, d=6) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, d, 2, 2)
        self.depthwise = nn.Conv2d(d, d, 3, padding=1, groups=d)
        self.norm = nn.LayerNorm(d)
        self.wide, self.narrow = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)
        self.gamma = nn.Parameter(torch.randn(d))
        self.head = nn.Linear(d, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        h = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        h = self.gamma * self.narrow(F.gelu(self.wide(h)))
        return self.head((x + h.permute(0, 3, 1, 2)).mean((-2, -1)))


class Windowed(nn.Module):
    """Attention with separate projections, norms of each head and a table of relative positions."""

    def __init__(self, d=12, heads=3) -> None:
        super().__init__()
        self.num_heads = heads
        self.patch = nn.Conv2d(3, 5, 2, 2)
        self.q, self.k, self.v = (nn.Linear(5, d) for _ in range(3))
        self.norm = nn.LayerNorm(d // heads)
        self.table = nn.Parameter(torch.randn(7, heads))
        self.scale = nn.Parameter(torch.rand(heads, 1, 1))
        self.register_buffer("index", torch.arange(256).view(16, 16) % 7)
        self.head = nn.Linear(d, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        b, n, _ = x.shape
        q, k, v = (layer(x).view(b, n, self.num_heads, -1).transpose(1, 2) for layer in (self.q, self.k, self.v))
        bias = self.table[self.index.view(-1)].view(n, n, -1).permute(2, 0, 1)
        weights = (self.norm(q) @ k.transpose(-2, -1) * self.scale + bias).softmax(-1)
        return self.head((weights @ v).transpose(1, 2).flatten(2)).mean(1)


class Upscaling(nn.Module):
    """Pixel shuffle, and transposed convolutions, grouped and not."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.shuffle, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.PixelShuffle(2), nn.Conv2d(4, 5, 3)
        self.up, self.grouped = nn.ConvTranspose2d(5, 10, 2, 2), nn.ConvTranspose2d(10, 20, 2, 2, groups=5)
        self.out = nn.Conv2d(20, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.grouped(self.up(self.b(self.shuffle(self.a(x))))))


class Causal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 2
        self.q, self.k, self.v = (nn.Linear(3, 8) for _ in range(3))
        self.out = nn.Linear(8, 2)
        self.register_buffer("mask", torch.ones(9, 9).tril())

    def forward(self, x: Tensor) -> Tensor:
        assert x.dim() == 3, "tokens are needed"
        b, n, _ = x.shape
        if n > self.mask.shape[0]:
            raise ValueError(n)
        q, k, v = (layer(x).view(b, n, self.num_heads, -1).transpose(1, 2) for layer in (self.q, self.k, self.v))
        scores = (q @ k.transpose(2, 3)).masked_fill(self.mask[:n, :n] == 0, float("-inf"))
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class Mixer(nn.Module):
    def __init__(self, dim=8, tokens=4) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, dim, 4, 4)
        self.token = nn.Sequential(nn.Linear(tokens, 6), nn.GELU(), nn.Linear(6, tokens))
        self.glu = nn.Linear(dim, 2 * dim)
        self.head = nn.Linear(dim, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2)
        x = (x + self.token(x)).transpose(1, 2)
        return self.head(F.glu(self.glu(x), -1).mean(1))


class Written(nn.Module):
    """LeNet with the number of features written out."""

    def __init__(self, out=False) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3)
        self.fc = nn.Linear(96, 4)
        self.out = out

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(self.conv1(x).relu()).relu()
        return self.fc(x.view(-1, 96) if self.out else x.view(x.size(0), -1))


class Shuffle(nn.Module):
    """Channel shuffle: cannot be cut one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)
        self.c = nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.c(self.b(x)).mean((2, 3))


ZOO = {
    "vgg": vgg,
    "vgg-gap": lambda: vgg(hidden=0),
    "resnet": lambda: ResNet("basic", 4, (2, 1, 1, 1)),
    "bottleneck": lambda: ResNet("bottleneck", 4, (2, 2)),
    "resnext": lambda: ResNet("bottleneck", 8, (1, 1), groups=4),
    "preact": PreAct,
    "densenet": DenseNet,
    "mobilenet": mobilenet,
    "squeeze-excite": SqueezeExcite,
    "group-norm": group_norm,
    "vit-torch": lambda: ViT("torch"),
    "vit-hand": lambda: ViT("hand"),
    "vit-fused": lambda: ViT("fused"),
    "vit-hard": lambda: ViT("hard"),
    "vit-norm-free": NormFreeViT,
    "encoder": Encoder,
    "convnext": ConvNeXt,
    "windowed": Windowed,
    "upscaling": Upscaling,
    "unet": UNet,
    "nested-cat": NestedCat,
    "mixer": Mixer,
    "view": Written,
    "view-written": lambda: Written(True),
    "shuffle": Shuffle,
}


def build(name: str, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """A network in double precision with random weights, norms and statistics, and a batch for it."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = ZOO[name]().double().eval()
        for module in model.modules():
            for key in ("weight", "bias", "running_mean"):
                value = getattr(module, key, None)
                if isinstance(value, Tensor) and value.dim() == 1:
                    value.data.normal_()
            if isinstance(getattr(module, "running_var", None), Tensor):
                module.running_var.uniform_(0.5, 2)
        for parameter in model.parameters():
            if not parameter.any():
                parameter.data.normal_()
        return model, torch.randn(2, 3, 8, 8, dtype=torch.float64)


@functools.cache
def _traced(name: str, seed: int) -> tuple[nn.Module, Tensor, ChannelGroups]:
    model, x = build(name, seed)
    return model, x, trace(model, x)


def traced(name: str, seed: int = 0) -> tuple[nn.Module, Tensor, ChannelGroups]:
    """What `build` gives, a copy of one's own, and its groups."""
    model, x, groups = _traced(name, seed)
    return copy.deepcopy(model), x.clone(), groups


def random_keep(groups, seed: int, rate: float = 0.5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keep = {}
    for group in groups.prunable:
        mask = torch.rand(group.width, generator=generator) < rate
        mask[torch.randint(group.width, (), generator=generator)] = True
        keep[group.name] = mask
    return keep
