"""The parts of the demo; `space/app.py` puts them together. Only `ui` knows gradio."""
