"""Flexible posteriors for variational autoencoders: features in, z and log q(z|x) out, in one pass."""

from typing import TYPE_CHECKING

from flowpost import bijectors as bijectors
from flowpost import calibration as calibration
from flowpost import evaluation as evaluation
from flowpost import functional as functional
from flowpost import gaps as gaps
from flowpost import importance as importance
from flowpost import objectives as objectives
from flowpost import recipes as recipes
from flowpost import schedules as schedules
from flowpost import testing as testing
from flowpost import training as training
from flowpost import vae as vae
from flowpost.bijectors import *
from flowpost.checks import DomainError as DomainError
from flowpost.checks import IllConditionedWarning as IllConditionedWarning
from flowpost.checks import InversionError as InversionError
from flowpost.checks import NonFiniteError as NonFiniteError
from flowpost.checks import checking as checking
from flowpost.density import Sample as Sample
from flowpost.distribution import FlowDistribution as FlowDistribution
from flowpost.files import CorruptFileError as CorruptFileError
from flowpost.files import load as load
from flowpost.files import save as save
from flowpost.fit import fit as fit
from flowpost.posterior import FlowPosterior as FlowPosterior
from flowpost.recipes import *
from flowpost.wrap import wrap as wrap

__version__ = "0.2.0"

if not TYPE_CHECKING:  # a type checker reads the imports themselves
    _PARTS = ["bijectors", "calibration", "evaluation", "functional", "gaps", "importance", "objectives", "recipes"]
    _PARTS += ["schedules", "testing", "training", "vae"]
    _NAMES = ["CorruptFileError", "DomainError", "FlowDistribution", "FlowPosterior", "IllConditionedWarning"]
    _NAMES += ["InversionError", "NonFiniteError", "Sample", "checking", "fit", "load", "save", "wrap"]
    __all__ = [*_PARTS, *_NAMES, *bijectors.__all__, *recipes.__all__]
    __all__.sort(key=lambda name: (name[0].islower(), name))
