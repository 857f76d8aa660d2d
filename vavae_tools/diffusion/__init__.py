"""Denoisers and what they are told, what they learn, and how is sampled."""

_FLOWS = ("linear", "gvp")
SOLVERS: dict[str, tuple[tuple[str, ...], str]] = {
    "euler": (_FLOWS, "FlowMatchEulerDiscreteScheduler"),
    "heun": (_FLOWS, "FlowMatchHeunDiscreteScheduler"),
    "adams": (_FLOWS, "AdamsScheduler"),
    "midpoint": (_FLOWS, "MidpointScheduler"),
    "sde": (_FLOWS, "StochasticScheduler"),
    "dpm++": (("linear", "discrete"), "DPMSolverMultistepScheduler"),
    "unipc": (("linear", "discrete"), "UniPCMultistepScheduler"),
    "ddpm": (("discrete",), "DDPMScheduler"),
    "ddim": (("discrete",), "DDIMScheduler"),
}
"""Name → what it solves, by `Objective.path`, and its class, of diffusers or of `solvers`. Here for --help's sake."""

USUAL_STEPS, FITTED_STEPS = 50, 10
"""Of images where none are asked for: Euler's, and of a schedule fitted to the model (`benchmarks.sampling`)."""
