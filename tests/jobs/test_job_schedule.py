"""When jobs fire: month ends, daylight saving, the rules of cron."""

from datetime import UTC, datetime, timedelta
from itertools import pairwise
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.schedule import Schedule, parse

BERLIN = ZoneInfo("Europe/Berlin")


def local(line: str, start: str, days: float, zone: ZoneInfo = BERLIN) -> list[str]:
    """Firings from a local time on, as the clock on the wall shows them, with its distance from UTC in hours."""
    after = datetime.fromisoformat(start).replace(tzinfo=zone).astimezone(UTC) - timedelta(seconds=1)
    found = Schedule(parse(line), zone).firings(after, after + timedelta(days=days))
    assert found == sorted(set(found))
    return [f"{f.astimezone(zone):%m-%d %H:%M%z}"[:-2] for f in found]


def test_a_nightly_time_that_daylight_saving_removes_fires_at_the_jump():
    assert local("30 2 * * *", "2026-03-28T00:00", 3) == ["03-28 02:30+01", "03-29 03:00+02", "03-30 02:30+02"]


def test_a_nightly_time_that_comes_twice_fires_once():
    assert local("30 2 * * *", "2026-10-24T00:00", 3) == ["10-24 02:30+02", "10-25 02:30+02", "10-26 02:30+01"]


def test_a_line_of_every_hour_fires_in_each_real_hour():
    assert local("0 * * * *", "2026-10-25T01:00", 0.18) == [
        "10-25 01:00+02", "10-25 02:00+02", "10-25 02:00+01", "10-25 03:00+01", "10-25 04:00+01",
    ]  # fmt: skip
    assert local("0 * * * *", "2026-03-29T01:00", 0.1) == ["03-29 01:00+01", "03-29 03:00+02", "03-29 04:00+02"]
    for month in (3, 10):
        start = datetime(2026, month, 24, tzinfo=UTC)
        week = Schedule(parse("*/30 * * * *"), BERLIN).firings(start, start + timedelta(days=7))
        assert {b - a for a, b in pairwise(week)} == {timedelta(minutes=30)}


@pytest.mark.parametrize("minutes", ["5", "10,40"])
@pytest.mark.parametrize("hour", ["*", "0-23"])
def test_a_line_of_every_hour_has_no_firing_at_the_jump(minutes, hour):
    def shown(*hours: str) -> list[str]:
        return [hour.replace("+", f":{minute:0>2}+") for hour in hours for minute in minutes.split(",")]

    spring = local(f"{minutes} {hour} * * *", "2026-03-29T01:00", 0.124)
    assert spring == shown("03-29 01+01", "03-29 03+02", "03-29 04+02")
    autumn = local(f"{minutes} {hour} * * *", "2026-10-25T01:00", 0.166)
    assert autumn == shown("10-25 01+02", "10-25 02+02", "10-25 02+01", "10-25 03+01")


def test_a_line_of_every_other_hour_names_hours():
    assert local("5 */2 * * *", "2026-03-29T00:00", 0.2) == ["03-29 00:05+01", "03-29 03:00+02", "03-29 04:05+02"]
    assert local("5 */2 * * *", "2026-10-25T00:00", 0.24) == ["10-25 00:05+02", "10-25 02:05+02", "10-25 04:05+01"]


def test_half_hour_jumps_and_zones_south_of_the_equator():
    lord_howe = ZoneInfo("Australia/Lord_Howe")  # back by 30 minutes on 2026-04-05 at 02:00
    assert local("45 1 * * *", "2026-04-05T00:00", 1, lord_howe) == ["04-05 01:45+11"]
    assert local("15 2 * * *", "2026-10-04T00:00", 1, lord_howe) == ["10-04 02:30+11"]


def test_sunday_is_written_as_every_scheduler_reads_it():
    lines = {"0 3 * * 7": "0 3 * * 0", "0 3 * * 5-7": "0 3 * * 0,5,6", "0 3 1 * 0-7": "0 3 1 * 0,1,2,3,4,5,6"}
    assert {line: parse(line).line for line in lines} == lines
    for line in ("0 3 * * sun", "0 3 * * */7", "0 3 */2 * *", "0 3 * * 1-5"):
        assert parse(line).line == line


def test_month_ends_and_leap_days():
    assert local("0 6 31 * *", "2026-01-01T00:00", 152) == ["01-31 06:00+01", "03-31 06:00+02", "05-31 06:00+02"]
    assert Schedule(parse("0 0 29 2 *"), UTC).next(datetime(2026, 1, 1, tzinfo=UTC)) == datetime(
        2028, 2, 29, tzinfo=UTC
    )
    assert local("0 0 28-31 2 *", "2028-02-01T00:00", 40) == ["02-28 00:00+01", "02-29 00:00+01"]
    assert local("59 23 31 12 *", "2026-12-30T00:00", 3) == ["12-31 23:59+01"]


def test_sunday_is_0_and_7_and_two_restricted_days_are_an_or():
    for day in ("0", "7", "sun"):
        assert local(f"0 3 * * {day}", "2026-11-23T00:00", 7) == ["11-29 03:00+01"]
    assert local("0 3 1 * mon", "2026-11-28T00:00", 11) == ["11-30 03:00+01", "12-01 03:00+01", "12-07 03:00+01"]
    assert local("0 3 * * 1-5", "2026-11-28T00:00", 4) == ["11-30 03:00+01", "12-01 03:00+01"]


@settings(max_examples=25, deadline=None)
@given(
    st.datetimes(datetime(2025, 1, 1), datetime(2027, 12, 31)),
    st.integers(0, 59), st.integers(0, 23),
    st.sampled_from(["Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "America/Santiago", "UTC"]),
)  # fmt: skip
def test_a_daily_job_fires_once_for_every_date(start, minute, hour, zone):
    """Whatever the clocks do, each local date has one firing, and `newest` and `next` agree with the list."""
    schedule = Schedule(parse(f"{minute} {hour} * * *"), ZoneInfo(zone))
    after = start.replace(tzinfo=UTC)
    found = schedule.firings(after, after + timedelta(days=40))
    dates = [f.astimezone(schedule.zone).date() for f in found]
    assert dates == [dates[0] + timedelta(days=i) for i in range(len(dates))]
    assert len(dates) in (39, 40, 41)
    assert schedule.next(after) == found[0]
    assert schedule.newest(found[3] + timedelta(seconds=1)) == schedule.newest(found[3]) == found[3]


def test_what_the_clocks_skip_can_be_told():
    schedule = Schedule(parse("30 2 * * *"), BERLIN)
    assert schedule.skipped(datetime(2026, 1, 1, tzinfo=UTC), datetime(2027, 1, 1, tzinfo=UTC)) == [
        datetime(2026, 3, 29, 2, 30)
    ]
    for line in ("15 1 * * *", "30 * * * *"):
        assert not Schedule(parse(line), BERLIN).skipped(
            datetime(2026, 1, 1, tzinfo=UTC), datetime(2027, 1, 1, tzinfo=UTC)
        )


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("* * * *", "has 4 fields"), ("@daily", "has 1 fields"), ("61 * * * *", "minute '61' is not within 0 to 59"),
        ("* 24 * * *", "hour '24'"), ("* * 0 * *", "day of month '0'"), ("* * * 13 *", "month '13'"),
        ("* * * * 8", "day of week '8'"), ("* * * * frid", "'frid'"), ("0 0 31 2,4 *", "never fires"),
        ("5/10 * * * *", "write 5-59/10"), ("* * * * fri-mon", "runs backwards"), ("*/0 * * * *", "at least 1"),
        ("1,,2 * * * *", "is none of"),
        ("0 4 */15 * mon", "day of month '*/15' beside a day of week: schedulers differ on whether both must match"),
        ("0 4 1 * */2", "write 0,2,4,6, and either suffices"), ("0 4 */2 * */3", "schedulers differ"),
        ("$(reboot) * * * *", "is none of"),
    ],
)  # fmt: skip
def test_a_bad_cron_line_says_what_is_wrong(line, said):
    with pytest.raises(ValueError, match=said.replace("$", r"\$").replace("(", r"\(").replace("*", r"\*")):
        parse(line)
