"""Rectified flow as algebra over tensors and callables; independent of any model. t = 0 is noise, t = 1 data.

loss = flow_matching_loss(velocity of interpolate(x0, x1, t), x0, x1) with t = logit_normal(standard normals)
sample = solve(euler(x0, time_grid(steps)), velocity)   # guided_velocity([v, v_weak], scale) in it guides
"""

from elit.flow.guidance import guided_velocity  # noqa: F401
from elit.flow.path import flow_matching_loss, interpolate, logit_normal, shift_time, target_velocity  # noqa: F401
from elit.flow.solver import euler, heun, solve, time_grid  # noqa: F401
