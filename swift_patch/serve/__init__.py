"""An OpenAI-compatible server in which every request brings its own fusion: `swift-patch deploy`."""
