"""For `swift infer --external_plugins THIS_FILE`: applies swift_patch in ms-swift's own process.

It has a folder to itself, for ms-swift puts a plugin's folder in front of `sys.path`.
"""
import swift_patch  # noqa: F401
