"""A device with a light model, a cloud side with a large one, and what they send each other.

The device is an adapter with ``prompt`` in its input slot. It predicts by itself, and sends the
images of which it is least sure, within a budget. The cloud side learns a prompt by a large teacher
and sends it down. See docs/cloud.md; the cloud side's server needs the extra ``[serve]``.

Example::

    cloud = tta.runtime.cloud.Cloud(model, teacher)
    serving = cloud.serve("127.0.0.1", 8000)
    adapter = tta.wrap(model, input="prompt", mean=mean, std=std)
    device = tta.runtime.cloud.Device(adapter, serving.address, budget=0.1)
    logits = device(images)
"""

from tta.runtime.cloud.budget import Budget
from tta.runtime.cloud.cloud import Cloud
from tta.runtime.cloud.device import Bytes, Device
from tta.runtime.cloud.uplink import CallUplink, HttpUplink, Uplink, UplinkError
from tta.runtime.cloud.wire import Downlink, MessageError, Upload

__all__ = [
    "Budget",
    "Bytes",
    "CallUplink",
    "Cloud",
    "Device",
    "Downlink",
    "HttpUplink",
    "MessageError",
    "Uplink",
    "UplinkError",
    "Upload",
]
