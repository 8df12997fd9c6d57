"""The playground: a Gradio page with a model's dial, drawn by an engine (`elit play`)."""

import os

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before Gradio is imported, which asks for newer versions else
os.environ.setdefault("HF_HUB_OFFLINE", "1")
