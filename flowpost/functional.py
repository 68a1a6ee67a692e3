"""The families as pure functions of tensors: ``(z, parameters) -> (z', log_det)``."""

from flowpost.bijectors.actnorm import act_norm as act_norm
from flowpost.bijectors.affine import affine as affine
from flowpost.bijectors.affine import exp_scale as exp_scale
from flowpost.bijectors.affine import log_var_scale as log_var_scale
from flowpost.bijectors.convex import convex_combination as convex_combination
from flowpost.bijectors.gate import gate as gate
from flowpost.bijectors.gate import gate_inverse as gate_inverse
from flowpost.bijectors.gate import gate_parameters as gate_parameters
from flowpost.bijectors.householder import householder as householder
from flowpost.bijectors.lu import lu_linear as lu_linear
from flowpost.bijectors.lu import lu_linear_inverse as lu_linear_inverse
from flowpost.bijectors.planar import planar as planar
from flowpost.bijectors.planar import planar_chain as planar_chain
from flowpost.bijectors.planar import planar_inverse as planar_inverse
from flowpost.bijectors.radial import radial as radial
from flowpost.bijectors.radial import radial_inverse as radial_inverse
from flowpost.bijectors.scales import softplus_scale as softplus_scale
from flowpost.bijectors.squash import sigmoid as sigmoid
from flowpost.bijectors.squash import sigmoid_inverse as sigmoid_inverse
from flowpost.bijectors.squash import softplus as softplus
from flowpost.bijectors.squash import softplus_inverse as softplus_inverse
from flowpost.bijectors.squash import tanh as tanh
from flowpost.bijectors.squash import tanh_inverse as tanh_inverse
from flowpost.bijectors.triangular import unit_lower_triangular as unit_lower_triangular
