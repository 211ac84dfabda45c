"""Sessions of one pipeline share its memory and its passes, and nothing of it shows in any of them."""

import pytest
import torch

from millstream.streaming import Frame, Session, WorldControl, step_together

PROMPTS = ["a brick corridor", "a slime arena", "a cave of ice"]


def together(sessions, count):
    """Frames [count, sessions, 3, H, W]."""
    return torch.stack([torch.stack([chunks[0].data[0] for chunks in step_together(sessions)]) for _ in range(count)])


def alone(make, seeded, number, warm, count, **settings):
    session = make().stream(PROMPTS[number], generator=seeded(number), **settings)
    return torch.stack([session.step()[0].data[0] for _ in range(warm + count)])[warm:]


def near(one, other):
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("warm", [(0, 0, 0), (0, 2, 3), (9, 0, 1), (6, 9, 5)], ids=str)
def test_stepped_together_equals_stepped_alone_at_any_fill(pipe, make, seeded, warm):
    sessions = [pipe.stream(prompt, generator=seeded(n)) for n, prompt in enumerate(PROMPTS)]
    for session, count in zip(sessions, warm):
        for _ in range(count):
            session.step()
    drawn = together(sessions, 6)
    for number, count in enumerate(warm):
        near(drawn[:, number], alone(make, seeded, number, count, 6))


def test_different_settings_and_a_true_frame_in_one_step(pipe, make, seeded):
    settings = [{"num_inference_steps": 1}, {"guidance_scale": 4.0}, {}]
    sessions = [pipe.stream(p, generator=seeded(n), **s) for n, (p, s) in enumerate(zip(PROMPTS, settings))]
    shown = Frame(torch.rand(3, 32, 48, generator=seeded()), 12.5)
    chunks = step_together(sessions, [None, None, shown])
    assert chunks[2][0].time == 12.5
    drawn = together(sessions, 5)
    for number in (0, 1):
        near(drawn[:, number], alone(make, seeded, number, 1, 5, **settings[number]))
    viewer = make().stream(PROMPTS[2], generator=seeded(2))
    viewer.step(shown)
    near(drawn[:, 2], torch.stack([viewer.step()[0].data[0] for _ in range(5)]))


def test_the_order_of_sessions_and_rows_does_not_matter(pipe, make, seeded):
    sessions = [pipe.stream(prompt, generator=seeded(n)) for n, prompt in enumerate(PROMPTS)]
    step_together(sessions)
    chosen = [sessions[2], sessions[0]]
    drawn = together(chosen, 4)
    near(drawn[:, 0], alone(make, seeded, 2, 1, 4))
    near(drawn[:, 1], alone(make, seeded, 0, 1, 4))
    assert sessions[1].state.frame == 1


def test_the_arena_grows_under_running_sessions(pipe, make, seeded):
    sessions = []
    drawn = [[], [], []]
    for number, prompt in enumerate(PROMPTS):
        sessions.append(pipe.stream(prompt, generator=seeded(number)))
        for _ in range(3):
            for session, frames in zip(sessions, drawn):
                frames.append(session.step()[0].data[0])
        assert pipe.arena.cache.rows == [1, 2, 4][number]
    for number, frames in enumerate(drawn):
        near(torch.stack(frames), alone(make, seeded, number, 0, len(frames)))


@pytest.mark.parametrize("poison", [1e4, float("nan")])
def test_a_row_used_again_carries_nothing_over(pipe, make, seeded, poison):
    first, second = (pipe.stream(PROMPTS[n], generator=seeded(n)) for n in (0, 1))
    for _ in range(7):
        step_together([first, second])
    row = first.state.row
    first.close()
    for store in (pipe.arena.cache.k, pipe.arena.cache.v):
        store[:, row] = poison
    third = pipe.stream(PROMPTS[2], generator=seeded(2))
    drawn = together([third, second], 6)
    assert third.state.row == row
    assert pipe.arena.cache.rows == 2
    near(drawn[:, 0], alone(make, seeded, 2, 0, 6))
    near(drawn[:, 1], alone(make, seeded, 1, 7, 6))


def test_a_prompt_switch_is_felt_by_its_session_alone_and_from_its_frame_on(pipe, make, seeded):
    sessions = [pipe.stream(prompt, generator=seeded(n)) for n, prompt in enumerate(PROMPTS)]
    before = together(sessions, 3)
    version = sessions[1].steer(prompt="a river of lava")
    after = together(sessions, 5)
    for number in (0, 2):
        near(torch.cat([before, after])[:, number], alone(make, seeded, number, 0, 8))
    unsteered = alone(make, seeded, 1, 0, 8)
    near(before[:, 1], unsteered[:3])
    assert (after[:, 1] - unsteered[3:]).flatten(1).abs().amax(1).min() > 1e-3, "every frame from the switch on"
    assert version == 1
    assert [session.applied for session in sessions] == [0, 1, 0]


def test_a_chunk_carries_the_version_it_was_drawn_under(pipe, seeded):
    sessions = [pipe.stream(prompt, generator=seeded(n)) for n, prompt in enumerate(PROMPTS[:2])]
    for step in range(4):
        sessions[step % 2].steer(keys={"KeyW"} if step < 2 else set())
        chunks = [chunk for (chunk,) in step_together(sessions)]
        assert [chunk.version for chunk in chunks] == [step // 2 + 1, (step + 1) // 2]
        assert [chunk.start for chunk in chunks] == [step, step]


def test_rows_come_back_when_sessions_end(pipe, seeded):
    for _ in range(5):
        with pipe.stream("a cave", generator=seeded()) as session:
            session.step()
            session.reset()
            session.step()
    session = pipe.stream("a cave")
    session.step()
    del session
    assert (pipe.arena.in_use, pipe.arena.cache.rows) == (0, 1)


def test_ending_a_state_twice_takes_no_row_from_another(pipe):
    state = pipe.begin(WorldControl("a cave"))
    pipe.end(state)
    other = pipe.begin(WorldControl("a cave"))
    pipe.end(state)
    assert pipe.begin(WorldControl("a cave")).row != other.row


def test_sessions_may_run_on_threads_of_their_own(pipe, make, seeded):
    from threading import Thread

    drawn = {}

    def run(number):
        with Session(pipe, WorldControl(PROMPTS[number]), generator=seeded(number)) as session:
            drawn[number] = torch.stack([session.step()[0].data[0] for _ in range(12)])

    threads = [Thread(target=run, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(3):
        near(drawn[number], alone(make, seeded, number, 0, 12))
