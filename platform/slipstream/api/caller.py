"""An authenticated caller, and what it may do."""

from __future__ import annotations

from dataclasses import dataclass

from adapter_registry.keys import Role
from adapter_registry.records import check_name
from slipstream.errors import Forbidden, InvalidRequest

TENANT_HEADER = "X-Slipstream-Tenant"


@dataclass(frozen=True, slots=True)
class Caller:
    """An authenticated caller and the tenant it acts for (the admin may have named none)."""

    tenant: str | None
    key_id: str
    is_admin: bool  # of the whole platform
    role: Role = Role.ADMIN  # within the tenant
    models: tuple[str, ...] | None = None  # that it may call; None = all

    def acting_tenant(self, least: Role = Role.CALLER) -> str:
        """The tenant; the admin must have named one. Raises `Forbidden` for a key of a lower role."""
        if self.tenant is None:
            raise InvalidRequest(
                f"The admin key belongs to no tenant. Send the header '{TENANT_HEADER}: <tenant>' to act for one.",
                code="tenant_required",
                param=TENANT_HEADER,
            )
        if not self.role.includes(least):
            raise Forbidden(f"This key has the role '{self.role}', and this needs '{least}'.", code="role_required")
        return self.tenant

    def may_call(self, model: str) -> bool:
        """Whether its key is for this base model or adapter."""
        return self.models is None or model in self.models

    def managed_tenant(self, named: str | None) -> str:
        """The tenant whose keys it manages: any for the platform's admin, its own for a tenant's."""
        if self.is_admin:
            return check_name(named, "tenant") if named is not None else self.acting_tenant()
        own = self.acting_tenant(Role.ADMIN)
        if named not in (None, own):
            raise Forbidden("This key manages its own tenant's keys only.")
        return own

    def require_admin(self) -> None:
        """Raise `Forbidden` for everybody else."""
        if not self.is_admin:
            raise Forbidden("Only the admin key may do this.")
