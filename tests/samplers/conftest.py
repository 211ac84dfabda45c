"""Property tests here are quick, but a busy machine must not fail them for being slow."""

from hypothesis import settings

settings.register_profile("samplers", deadline=None)
settings.load_profile("samplers")
