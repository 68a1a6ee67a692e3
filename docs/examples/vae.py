"""A VAE from scratch: a posterior from flowpost, and everything else in sight.

    PYTHONPATH=. python docs/examples/vae.py

It trains on the 1,797 digits that come with the repository, on a CPU, within a minute.
"""

import warnings

import torch
from torch import Tensor, nn

import flowpost
from benchmarks.data import load
from flowpost.evaluation import importance_estimate
from flowpost.importance import UnreliableEstimateWarning
from flowpost.objectives import elbo
from flowpost.schedules import linear
from flowpost.vae import VAE, Binomial

# ------------------------------------------------------------------------------------------------ what to change
POSTERIOR = "full_covariance"  # the name of any recipe: diagonal, planar, iaf, realnvp, ...
DIM = 8  # size of z
WIDTH = 128  # of the hidden layers, and of the features h
BATCH = 128
EPOCHS = 100
RATE = 2e-3  # Adam's learning rate at the start; it falls to 0
WARM_UP = 20  # epochs in which the weight of the KL rises from 0 to 1
SAMPLES = 200  # of z for each image, for log p(x)


# ------------------------------------------------------------------------------------------------------ the model
def build(levels: int) -> VAE:
    """A VAE of x (B, 8, 8) with grey values 0..levels; the decoder returns a logit for each pixel."""
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU())
    decoder = nn.Sequential(nn.Linear(DIM, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 64))
    posterior = flowpost.recipes.RECIPES[POSTERIOR](WIDTH, DIM)  # features h (B, WIDTH) in, z (B, DIM) out
    return VAE(encoder, posterior, decoder, Binomial(levels))


# --------------------------------------------------------------------------------------------------- the training
def train(epochs: int = EPOCHS, seed: int = 0) -> tuple[VAE, list[float]]:
    """The trained model, and the mean ELBO of the validation images after each epoch."""
    torch.manual_seed(seed)
    data = load("digits")  # train (1197, 8, 8), valid (300, 8, 8), test (300, 8, 8)
    vae, history = build(data.levels), []
    optimizer = torch.optim.Adam(vae.parameters(), lr=RATE)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=epochs)
    for epoch in range(epochs):
        vae.train()
        weight = linear(epoch, min(WARM_UP, epochs // 2))
        for index in torch.randperm(len(data.train)).split(BATCH):
            out = vae(data.train[index])  # log_likelihood, log_prior and log_q, each (B,)
            loss = -elbo(out.log_likelihood, out.log_prior, out.log_q, out.kl, kl_weight=weight).mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(vae.parameters(), 100.0)
            optimizer.step()
        scheduler.step()
        history.append(bound(vae, data.valid))
        if epoch % 20 == 19 or epoch == epochs - 1:
            print(f"epoch {epoch + 1:3d}   loss {loss.item():6.2f}   ELBO of the validation images {history[-1]:7.2f}")
    return vae, history


@torch.no_grad()
def bound(vae: VAE, x: Tensor) -> float:
    """The mean ELBO over x (N, 8, 8), with 4 samples of z for each."""
    terms = vae.eval().elbo_terms(x, (4,))
    return (terms.reconstruction - terms.kl).mean().item()


# ------------------------------------------------------------------------------------------------ what to report
def report(vae: VAE) -> None:
    """ELBO and log p(x) of the test images, and for how many the second is to be trusted."""
    x = load("digits").test
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnreliableEstimateWarning)  # what it says is printed below
        log_p, _, _, k_hat = importance_estimate(vae.eval(), x, SAMPLES)  # each (300,)
    print(f"test: ELBO {bound(vae, x):.2f}, log p(x) about {log_p.mean():.2f}, in nats an image")
    print(f"k-hat is above 0.7 for {(k_hat > 0.7).double().mean():.0%} of the images")


if __name__ == "__main__":
    model, _ = train()
    report(model)
