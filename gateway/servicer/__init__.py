"""The gateway's calls: they translate, hand over, await, and translate back."""

from gateway.servicer.admin import AdminServicer
from gateway.servicer.desk import FrontDesk, Outside
from gateway.servicer.gateway import GatewayServicer

__all__ = ["AdminServicer", "FrontDesk", "GatewayServicer", "Outside"]
