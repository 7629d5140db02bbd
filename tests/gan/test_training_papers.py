"""Steps of both trainings against the papers' formulas, written down once more in plain torch.

The networks are those of the package; losses, gradients, optimisers and averages are computed here.
"""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ovcalib.gan import teacher
from ovcalib.gan.distillation import StudentRecipe, StudentTraining
from ovcalib.gan.sampling import from_pixels, one_hot
from ovcalib.gan.teacher import TeacherTraining
from ovcalib.gan.training import TrainingImages, batch_indices, step_seed
from tests.gan.test_training import ALONE, CPU, tiny_recipe, toy_data, toy_pairs

# Student (Masouris et al. 2022, with the objectives of TinyGAN) ------------------------------------------------


def real_images(count=24):
    rng = np.random.default_rng(1)
    return TrainingImages(rng.integers(0, 256, (count, 32, 32, 3), np.uint8), np.arange(count) % 3, ("r", "g", "b"))


def new_student(**changed):
    recipe = StudentRecipe(**{"epochs": 4, "batch": 8, "ndf": 4, "adversarial_every": 2, **changed})
    return StudentTraining(recipe, toy_pairs(), real_images(), CPU)


def distilled(training, steps):
    """(losses, generator, discriminator, the gradient that the last step of the discriminator took)"""
    recipe, pairs = training.recipe, training.pairs
    generator, discriminator = copy.deepcopy(training.generator), copy.deepcopy(training.discriminator)
    of_generator = torch.optim.Adam(generator.parameters(), 2e-4, betas=(0.5, 0.999))
    of_discriminator = torch.optim.Adam(discriminator.parameters(), 2e-4, betas=(0.5, 0.999))
    real, losses = real_images(), []
    generator.train()
    for step in range(steps):
        epoch, inside = divmod(step, 3)  # 24 images in batches of 8
        index = batch_indices(24, 8, inside, step_seed(recipe.seed, epoch, 1))
        z, c = torch.from_numpy(pairs.z[index]), one_hot(pairs.labels[index], 3)
        shown = from_pixels(pairs.images[index])
        index = batch_indices(24, 8, inside, step_seed(recipe.seed, epoch, 2))
        photographs, own_c = from_pixels(real.images[index]), one_hot(real.labels[index], 3)
        rng = torch.Generator().manual_seed(step_seed(recipe.seed, step))

        with torch.no_grad():
            student, own = generator(z, c), generator(torch.randn(8, 8, generator=rng), own_c)
        judged = [discriminator(*given) for given in ((shown, c), (student, c), (photographs, own_c), (own, own_c))]
        (of_teacher, of_student, of_real, of_own), features = [d for d, _ in judged], judged[0][1]
        loss_d = (
            F.relu(1 - of_teacher).mean() + F.relu(1 + of_student).mean()
            + 0.2 * (F.relu(1 - of_real).mean() + F.relu(1 + of_own).mean())
        )  # fmt: skip
        of_discriminator.zero_grad()
        loss_d.backward()
        gradient = [p.grad.clone() for p in discriminator.parameters()]
        of_discriminator.step()

        student = generator(z, c)
        logits, maps = discriminator(student, c)
        loss_g = sum(
            w * (a - b.detach()).abs().mean() for w, a, b in zip((1 / 16, 1 / 8, 1 / 4, 1), maps, features, strict=True)
        )
        loss_g = loss_g + (0.2 - 0.01 * epoch) * (student - shown).abs().mean()
        if inside % 2 == 1:
            own = generator(torch.randn(8, 8, generator=rng), own_c)
            loss_g = loss_g - 0.01 * logits.mean() - 0.002 * discriminator(own, own_c)[0].mean()
        of_generator.zero_grad()
        loss_g.backward()
        of_generator.step()
        losses.append((loss_d.item(), loss_g.item()))
    return losses, generator, discriminator, gradient


def same_state(found, expected, atol) -> None:
    torch.testing.assert_close(dict(found.state_dict()), dict(expected.state_dict()), rtol=1e-4, atol=atol)


def test_a_student_descends_on_the_published_objectives() -> None:
    training = new_student()
    losses, generator, discriminator, gradient = distilled(training, 5)
    reports = [training.step() for _ in range(5)]
    np.testing.assert_allclose([(r["loss_d"], r["loss_g"]) for r in reports], losses, rtol=1e-4)
    same_state(training.generator, generator, 2e-6)
    same_state(training.discriminator, discriminator, 2e-6)
    # The generator's step leaves no gradient in the discriminator.
    for parameter, wanted in zip(training.discriminator.parameters(), gradient, strict=True):
        assert parameter.requires_grad
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-3, atol=1e-6)


def test_batch_norm_sees_latents_of_pairs_twice_for_one_of_its_own() -> None:
    training = StudentTraining(StudentRecipe(batch=2, ndf=4), toy_pairs(), None, CPU)
    for _ in range(10):
        training.step()
    # Both steps see the pairs; the discriminator's step also latents of its own, the generator's every tenth time.
    assert training.generator.project[1].num_batches_tracked == 20 + 10 + 1


# Teacher (Karras et al. 2020, configuration `cifar`) -----------------------------------------------------------


def new_teacher(**changed):
    recipe = tiny_recipe(
        path_length_weight=0.0, r1_interval=2, r1_gamma=3.0, ema_kimg=0.02, ema_rampup=10.0, ada_interval=100, **changed
    )
    return TeacherTraining(teacher.fitted(recipe, 16, 4), toy_data(), ALONE)


def trained(training, steps):
    """(losses, generator, discriminator, averaged generator)"""
    recipe, data = training.recipe, toy_data()
    generator, discriminator = copy.deepcopy(training.generator), copy.deepcopy(training.discriminator)
    average = copy.deepcopy(generator)
    rates = [(0.0025 * r, (0.0, 0.99**r)) for r in (4 / 5, 2 / 3)]
    of_generator, of_discriminator = (
        torch.optim.Adam(network.parameters(), rate, betas=betas, eps=1e-8)
        for network, (rate, betas) in zip((generator, discriminator), rates, strict=True)
    )
    losses = []

    def fake(rng):
        z = torch.randn(8, recipe.generator.z_dim, generator=rng[0])
        c = one_hot(data.labels[torch.randint(64, (8,), generator=rng[0]).numpy()], 4)
        ws = generator.styles(z, c)
        generator.mapping.w_avg.lerp_(ws[:, 0].detach().mean(0), 0.005)
        return generator.synthesis(ws, "random", None, rng[1]), c

    for step in range(steps):
        rng = [torch.Generator().manual_seed(step_seed(recipe.seed, step, 0)) for _ in range(2)]
        images, c = fake(rng)
        loss_g = F.softplus(-discriminator(images, c)).mean()
        found = torch.autograd.grad(loss_g, list(generator.parameters()), allow_unused=True)
        for parameter, gradient in zip(generator.parameters(), found, strict=True):
            parameter.grad = gradient
        of_generator.step()

        index = batch_indices(64, 8, step, recipe.seed)
        real, real_c = from_pixels(data.images[index]), one_hot(data.labels[index], 4)
        with torch.no_grad():
            images, c = fake(rng)
        loss_d = F.softplus(-discriminator(real, real_c)).mean() + F.softplus(discriminator(images, c)).mean()
        of_discriminator.zero_grad()
        loss_d.backward()
        of_discriminator.step()
        if step % 2 == 0:
            real = real.clone().requires_grad_()
            (slope,) = torch.autograd.grad(discriminator(real, real_c).sum(), real, create_graph=True)
            of_discriminator.zero_grad()
            (2 * 3.0 / 2 * slope.square().sum((1, 2, 3)).mean()).backward()
            of_discriminator.step()

        share = 0.5 ** (8 / min(20, 10 * 8 * max(step, 1)))
        with torch.no_grad():
            for mean, value in zip(average.parameters(), generator.parameters(), strict=True):
                mean.copy_(share * mean + (1 - share) * value)
            average.mapping.w_avg.copy_(generator.mapping.w_avg)
        losses.append((loss_d.item(), loss_g.item()))
    return losses, generator, discriminator, average


def test_a_teacher_descends_on_the_published_objectives() -> None:
    training = new_teacher()
    losses, generator, discriminator, average = trained(training, 4)
    reports = [training.step() for _ in range(4)]
    assert ["r1" in report for report in reports] == [True, False, True, False]
    np.testing.assert_allclose([(r["loss_d"], r["loss_g"]) for r in reports], losses, rtol=1e-3)
    # Adam without momentum turns every gradient into a step of about the rate, whatever its size.
    same_state(training.generator, generator, 1e-4)
    same_state(training.discriminator, discriminator, 1e-4)
    same_state(training.average, average, 1e-4)


@pytest.mark.parametrize(("recipe", "published"), [
    (StudentRecipe(), {"epochs": 150, "batch": 128, "learning_rate": 2e-4, "pixel_weight": 0.2, "pixel_step": 0.01,
                       "adversarial_weight": 0.01, "own_share": 0.2, "real_weight": 0.2, "adversarial_every": 10, "ndf": 128}),
    (teacher.preset("paper"), {"kimg": 100_000, "batch": 64, "learning_rate": 0.0025, "r1_gamma": 0.01, "r1_interval": 16,
                               "path_length_weight": 0, "path_interval": 4, "ema_kimg": 500, "ema_rampup": 0.05,
                               "ada_target": 0.6, "ada_interval": 4, "ada_kimg": 500}),
])  # fmt: skip
def test_the_published_settings_are_the_defaults(recipe, published) -> None:
    settings = dataclasses.asdict(recipe)
    assert {key: settings[key] for key in published} == published
