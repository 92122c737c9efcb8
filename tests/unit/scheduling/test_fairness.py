"""Who goes next. Goal: newcomers are next, nobody waits for ever, ties are fixed."""

from embedserve.scheduling.fairness import FairOrder, Flow


def order_of(*names):
    order = FairOrder(1)
    flows = [Flow(name, seq, 1) for seq, name in enumerate(names)]
    for flow in flows:
        join(order, flow)
    return order, flows


def join(order, flow):
    order.activate(flow)
    flow.work[0] = {0: object()}
    order.enqueue(flow, 0)


def leave(order, flow):
    flow.work[0] = None
    order.leave(flow)


def serve(order, tokens=10):
    flow = order.head(0)
    order.charge(flow, tokens)
    return flow.key


class TestFairOrder:
    def test_equal_flows_take_turns_in_order_of_arrival(self):
        order, _ = order_of("a", "b", "c")

        assert [serve(order) for _ in range(6)] == ["a", "b", "c", "a", "b", "c"]

    def test_shares_are_of_tokens_not_of_turns(self):
        order, _ = order_of("a", "b")
        served = {"a": 0, "b": 0}
        for _ in range(300):
            name = order.head(0).key
            tokens = 30 if name == "a" else 10
            order.charge(order.head(0), tokens)
            served[name] += tokens

        assert abs(served["a"] - served["b"]) <= 30

    def test_a_newcomer_beside_one_that_ran_alone_is_next(self):
        order, _ = order_of("bulk")
        for _ in range(100):
            serve(order, 1_000)
        join(order, Flow("one", 7, 1))

        assert serve(order) == "one"

    def test_a_flood_of_newcomers_does_not_hold_back_for_ever_one_that_was_served(self):
        """Each newcomer starts at virtual time; virtual time has to move, or the old one never is the least again."""
        order, _ = order_of("old")
        serve(order, 1_000)
        for k in range(2_000):
            newcomer = Flow(f"new{k}", k + 1, 1)
            join(order, newcomer)
            if serve(order, 10) == "old":
                break
            leave(order, newcomer)
        else:
            raise AssertionError("starved")

        assert k < 250

    def test_coming_in_pieces_gains_nothing(self):
        """A flow that leaves with a lead comes back with it, as long as others wait."""
        order, (a, _) = order_of("a", "b")
        serve(order, 1_000)
        leave(order, a)
        again = Flow("a", 9, 1)
        join(order, again)

        assert [serve(order, 100) for _ in range(5)] == ["b"] * 5

    def test_a_lead_ends_with_the_busy_period(self):
        order, (a, b) = order_of("a", "b")
        serve(order, 1_000)
        leave(order, a)
        leave(order, b)
        again = Flow("a", 9, 1)
        join(order, again)
        join(order, Flow("c", 10, 1))

        assert serve(order, 10) == "a"

    def test_the_gone_cannot_fill_memory(self):
        """Flows that come and go without being served leave no entries behind."""
        order, _ = order_of("stays")
        for k in range(5_000):
            flow = Flow(f"f{k}", k + 1, 1)
            join(order, flow)
            leave(order, flow)

        assert len(order.heaps[0]) <= 3 * FairOrder.SLACK

    def test_many_served_once_are_forgotten(self):
        """Leads of flows that do not come back are dropped when virtual time has passed them."""
        order, _ = order_of("stays")
        for k in range(5_000):
            flow = Flow(f"f{k}", k + 1, 1)
            join(order, flow)
            serve(order, 5)
            leave(order, flow)

        assert len(order._idle) <= 4 * FairOrder.SLACK
