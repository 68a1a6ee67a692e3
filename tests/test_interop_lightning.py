"""A VAE in a LightningModule: it trains, checkpoints, and a run that resumes ends where one without a break does."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import flowpost
from flowpost.objectives import elbo
from flowpost.vae import VAE, Bernoulli

lightning = pytest.importorskip("lightning", reason="Lightning comes with the extra flowpost[interop]")

EPOCHS = 4


@pytest.fixture(autouse=True)
def _its_own_warnings() -> Iterator[None]:
    """Lightning advises on loaders' workers and says what of itself is old; the tests' rule is for flowpost's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Model(lightning.LightningModule):
    def __init__(self, name: str = "iaf") -> None:
        super().__init__()
        self.save_hyperparameters()
        posterior = getattr(flowpost, name)(8, dim=2, **({"hidden": (8,)} if name == "iaf" else {}))
        self.vae = VAE(nn.Sequential(nn.Linear(12, 8), nn.ReLU()), posterior, nn.Linear(2, 12), Bernoulli())
        self.losses: list[float] = []

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        torch.manual_seed(self.global_step)  # Lightning's checkpoint has no state of the generator
        out = self.vae(batch[0])
        loss = -elbo(out.log_likelihood, out.log_prior, out.log_q, out.kl).mean()
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=3e-2)


def data() -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(64, 12, generator=generator).round()
    x[:, 6:] = x[:, :6]  # there is something to learn
    return DataLoader(TensorDataset(x), batch_size=16)


def fitted(folder: Path, model: Model, epochs: int, resume: str | None = None) -> tuple[Model, Any]:
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, data(), ckpt_path=resume)
    return model, trainer


def fresh(name: str) -> Model:
    torch.manual_seed(3)
    return Model(name)


@pytest.mark.parametrize("name", ["full_covariance", "iaf"])
def test_a_resumed_run_ends_where_an_unbroken_one_does(name: str, tmp_path: Path) -> None:
    whole, _ = fitted(tmp_path, fresh(name), EPOCHS)
    half, trainer = fitted(tmp_path, fresh(name), EPOCHS // 2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    torch.manual_seed(4)
    resumed, _ = fitted(tmp_path, Model(name), EPOCHS, str(tmp_path / "half.ckpt"))
    for key, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value), key
    assert half.losses + resumed.losses == whole.losses
    assert sum(whole.losses[-4:]) < sum(whole.losses[:4])


def test_a_checkpoint_loads_by_itself(tmp_path: Path) -> None:
    model, trainer = fitted(tmp_path, fresh("iaf"), 1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    loaded = Model.load_from_checkpoint(tmp_path / "one.ckpt")
    h, noise = torch.randn(3, 8), torch.randn(3, 2)
    for one, other in zip(loaded.vae.posterior(h, noise=noise), model.vae.posterior(h, noise=noise), strict=True):
        assert torch.equal(one, other)
