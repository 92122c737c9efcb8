"""Who is set aside while a batch is filled, and what that means for those behind them in the fair order.

Decides who may have the room that large submissions leave. Must never know why a batch is as large as it is, or the
time.

Large submissions are capped so that a small one that comes meanwhile is in time; what they leave may be filled with
others' work. But a cap is no turn: whoever is set aside for it alone is still behind. If others had all that is left of
every batch, tenants with large jobs would have the cap's part together, however many they are, and a crowd of small
calls all the rest. So a tenant that is more than a turn ahead of the least of those does not ride on: the batch ends
shorter, which costs its fixed cost and no more. A turn is as far as the fair order itself lets anybody get ahead. Who
has not had more than its share, a newcomer above all, is never held back (``FairOrder.charge`` says why those who ride
out of turn must not move virtual time).

Among the requests of one tenant there is no such rule: one that is not large ends within a batch, and its successor
would come in at virtual time all the same. Lower classes together have one turn of what is left, so that a call of
theirs rides at once too, and nothing where a tenant of the class above was held back.
"""

from __future__ import annotations

from embedserve.scheduling.fairness import Flow, PriorityClass, Tenant

__all__ = ["Aside"]


class Aside:
    """Tenants and flows of one class that are out of one lane's order until the batch is filled."""

    __slots__ = ("_capped", "_entitled", "_held_back", "_lane", "_order", "_quantum", "_tenants", "behind", "flows")

    def __init__(self, klass: PriorityClass, lane: int, quantum: int) -> None:
        self._order = klass.tenants
        self._lane = lane
        self._quantum = quantum
        self._entitled = klass.tenants.vtime
        """Virtual time when the batch was begun: who is not beyond it has had no more than its share."""
        self._capped: set[Tenant] = set()
        """Those with large work that would have fitted without the cap."""
        self.behind: int | None = None
        """The least tag of those of them that have nothing else here. Who is served now is served out of turn."""
        self._held_back = False
        self._tenants: list[Tenant] = []
        self.flows: list[tuple[Tenant, Flow]] = []

    def is_passed_over(self, head: Tenant) -> bool:
        """Whether the next tenant, and so all after it, are too far ahead of one that the cap has set aside."""
        if self.behind is None:
            return False
        reach = self.behind + (self._quantum << self._order.SCALE_BITS)
        self._held_back = head.tag > max(self._entitled, reach)
        return self._held_back

    def is_alone(self, tenant: Tenant) -> bool:
        """Whether the next flow of a tenant is the only one here, so that nobody waits for its turn to end."""
        lane = self._lane
        return self.behind is None and len(self._order.heaps[lane]) == 1 and len(tenant.flows.heaps[lane]) == 1

    def put_tenant(self, tenant: Tenant) -> None:
        """The next tenant has nothing more for this batch. They come in the order of their tags, the least first."""
        self._order.set_aside(self._lane)
        self._tenants.append(tenant)
        if self.behind is None and tenant in self._capped:
            self.behind = tenant.tag

    def put_flow(self, tenant: Tenant, flow: Flow, *, capped: bool) -> None:
        """What the next flow of a tenant has next does not fit, or only large work's part has no room for it."""
        tenant.flows.set_aside(self._lane)
        self.flows.append((tenant, flow))
        if capped:
            self._capped.add(tenant)

    def restore(self, room_tokens: int) -> int:
        """All are back in the order. Returns how much of the room that is left lower classes may have."""
        for tenant, flow in self.flows:
            tenant.flows.enqueue(flow, self._lane)
        for tenant in self._tenants:
            self._order.enqueue(tenant, self._lane)
        if self._held_back:
            return 0
        return min(room_tokens, self._quantum) if self._capped else room_tokens
