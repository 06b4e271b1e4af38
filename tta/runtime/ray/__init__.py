"""The server of `tta.runtime.server` on Ray Serve: one front, and replicas with the streams.

Needs the extra ``[ray]``.

Example::

    def make():  # in each replica; `folder` is one that all of them reach
        pool = tta.runtime.open_or_make(tta.wrap(model(), "auto"), folder, shared=True)
        return tta.runtime.server.application(pool, transform, class_names, hosts=None)

    tta.runtime.ray.run(tta.runtime.ray.application(make, replicas=2))

Requests go to replicas by consistent hashing on the stream's name. A replica that dies leaves its
streams to others, which go on from the last snapshots in the folder.
"""

from tta.runtime.ray.deploying import application, run

__all__ = ["application", "run"]
