"""An HTTP server over a pool of streams; needs the extra ``[serve]``.

Example::

    pool = tta.runtime.StreamPool(tta.wrap(model, "auto"), folder="streams")
    app = tta.runtime.server.application(pool, transform, class_names)
    tta.runtime.server.run(app)  # or uvicorn, or any other ASGI server
"""

from tta.runtime.server.application import application
from tta.runtime.server.limits import Limits
from tta.runtime.server.running import run

__all__ = ["Limits", "application", "run"]
