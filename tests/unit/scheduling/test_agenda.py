"""Instants at which submissions become due."""

from embedserve.scheduling.agenda import Agenda


class TestAgenda:
    def test_due_in_order_ties_by_id(self):
        a = Agenda(lambda _: True)
        for instant, number in ((30, 1), (10, 3), (10, 2), (20, 4)):
            a.add(instant, number)

        assert a.first_ns() == 10
        assert [a.pop_due(20) for _ in range(4)] == [2, 3, 4, None]
        assert a.first_ns() == 30

    def test_the_gone_are_not_reported(self):
        live = {2}
        a = Agenda(live.__contains__)
        a.add(10, 1)
        a.add(20, 2)

        assert a.first_ns() == 20
        assert a.pop_due(15) is None

    def test_the_gone_cannot_fill_memory(self):
        """Submissions that come and leave behind one that stays are swept."""
        live = {0}
        a = Agenda(live.__contains__)
        a.add(0, 0)
        for number in range(1, 100_000):
            a.add(number, number)

        assert len(a) <= 4 * Agenda.SLACK
