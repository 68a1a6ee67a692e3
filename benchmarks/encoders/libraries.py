"""Small encoders of public libraries, from a configuration: random weights, nothing downloaded."""

# pyright: reportMissingImports=false
from __future__ import annotations

import torch
from torch import Tensor, nn

TOKENS, WORDS = 9, 50


def pythae_mlp(event: tuple[int, ...] = (1, 28, 28), dim: int = 4) -> nn.Module:
    """Two layers; it returns a `ModelOutput` of embedding and log_covariance."""
    from pythae.models import VAEConfig
    from pythae.models.nn.default_architectures import Encoder_VAE_MLP

    return Encoder_VAE_MLP(VAEConfig(input_dim=event, latent_dim=dim))


def pythae_conv(dim: int = 4) -> nn.Module:
    """Its convolutions for MNIST, four layers and 11 million weights."""
    from pythae.models import VAEConfig
    from pythae.models.nn.benchmarks.mnist import Encoder_Conv_VAE_MNIST

    return Encoder_Conv_VAE_MNIST(VAEConfig(input_dim=(1, 28, 28), latent_dim=dim))


def autoencoder_kl(channels: int = 2, width: int = 16) -> tuple[nn.Module, nn.Module]:
    """A small AutoencoderKL of grey images, which it makes four times smaller in each direction.

    Returns:
        Its encoder up to the moments, loc and log_var side by side in the channels; and its decoder.
    """
    from diffusers import AutoencoderKL

    model: nn.Module = AutoencoderKL(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(width,) * 3,
        latent_channels=channels,
        norm_num_groups=4,
    )
    part = model.get_submodule
    return nn.Sequential(part("encoder"), part("quant_conv")), nn.Sequential(part("post_quant_conv"), part("decoder"))


def vit() -> nn.Module:
    """Two layers, of 16 patches and a first token."""
    from transformers import ViTConfig, ViTModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return ViTModel(ViTConfig(image_size=28, patch_size=7, num_channels=1, **sizes))


def bert() -> nn.Module:
    """Two layers."""
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return BertModel(BertConfig(vocab_size=WORDS, max_position_embeddings=16, **sizes))


def words() -> dict[str, Tensor]:
    """What a tokenizer returns: words, and which of them are there."""
    there = torch.arange(TOKENS) < torch.tensor([TOKENS, 4, 7]).unsqueeze(-1)
    return {"input_ids": torch.randint(WORDS, (3, TOKENS)), "attention_mask": there.long()}


def torchvision_resnet(outputs: int | None = None) -> nn.Module:
    """A ResNet-18 with so many outputs, or that ends in its 512 features."""
    from torchvision.models import resnet18

    model = resnet18(num_classes=outputs or 1)
    if outputs is None:
        model.fc = nn.Identity()
    return model


def timm_resnet() -> nn.Module:
    """A ResNet-18 of grey images that ends in its features."""
    import timm

    return timm.create_model("resnet18", num_classes=0, in_chans=1)
