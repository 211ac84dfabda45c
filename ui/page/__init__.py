"""The page of the live app: `build_page` makes it, `mount_page` puts it and its static files on a FastAPI app.

Live pictures never pass through Gradio: the modules in `static/` speak the socket at /live and draw on a canvas. Gradio
is the page around them, and runs what is a call of Python with a result: Generate and the model picker.
"""

from .build import STATIC, build_page, mount_page
from .settings import PageSettings

__all__ = ["STATIC", "PageSettings", "build_page", "mount_page"]
