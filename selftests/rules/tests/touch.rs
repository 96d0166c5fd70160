// SPDX-License-Identifier: GPL-2.0

//! rust/rules/touch.rs, for every input there is.

use kdp_rules::rules::touch::{decide, State, Toucher, Verdict};

const STATES: [State; 6] = [
    State::Present,
    State::Zero,
    State::Sourced,
    State::Absent,
    State::Poisoned,
    State::Removed,
];

struct Case {
    state: State,
    who: Toucher,
    served: bool,
    verdict: Verdict,
}

fn every_case() -> impl Iterator<Item = Case> {
    STATES.into_iter().flat_map(|state| {
        (0..16).map(move |bits| {
            let who = Toucher {
                exits: bits & 1 != 0,
                may_retry: bits & 2 != 0,
                no_wait: bits & 4 != 0,
            };
            let served = bits & 8 != 0;
            Case {
                state,
                who,
                served,
                verdict: decide(state, who, served),
            }
        })
    })
}

/// The table of the design. A column's first letter in capitals is yes, in small ones no, `*` both.
const TABLE: &[(State, &str, Verdict)] = &[
    // served, exits, retry, nowait
    (State::Present, "* * * *", Verdict::Map),
    (State::Zero, "* * * *", Verdict::FillZero),
    (State::Removed, "* * * *", Verdict::Fail),
    // Served or not: nobody can.
    (State::Poisoned, "* E * *", Verdict::Exit),
    (State::Poisoned, "* e * *", Verdict::Poison),
    // Served or not, exits or not: nobody is asked.
    (State::Sourced, "* * r *", Verdict::Fail),
    (State::Sourced, "* * R N", Verdict::Retry),
    (State::Sourced, "* * R n", Verdict::Fetch),
    (State::Absent, "s * * *", Verdict::Fail),
    (State::Absent, "S E * *", Verdict::Exit),
    (State::Absent, "S e r *", Verdict::Fail),
    (State::Absent, "S e R N", Verdict::Retry),
    (State::Absent, "S e R n", Verdict::Wait),
];

#[test]
fn the_table_of_the_design() {
    let column = |pattern: &str, yes: bool| match pattern {
        "*" => true,
        letter => letter.chars().all(char::is_uppercase) == yes,
    };
    let mut cases = 0;
    for case in every_case() {
        let is = [
            case.served,
            case.who.exits,
            case.who.may_retry,
            case.who.no_wait,
        ];
        let rows: Vec<_> = TABLE
            .iter()
            .filter(|(state, columns, _)| {
                *state == case.state && columns.split(' ').zip(is).all(|(p, yes)| column(p, yes))
            })
            .collect();
        assert_eq!(rows.len(), 1, "the table has one row for {:?}", case.who);
        let (state, columns, verdict) = rows[0];
        assert_eq!(case.verdict, *verdict, "{state:?} {columns}");
        cases += 1;
    }
    assert_eq!(cases, 96);
}

/// Invariant 5.
#[test]
fn a_poisoned_page_is_never_mapped_nor_filled_nor_waited_for() {
    for case in every_case().filter(|case| case.state == State::Poisoned) {
        assert!(
            matches!(case.verdict, Verdict::Exit | Verdict::Poison),
            "{:?}",
            case.who
        );
    }
}

/// Invariant 6: fail closed.
#[test]
fn an_absent_page_is_never_mapped_nor_filled() {
    for case in every_case().filter(|case| case.state == State::Absent) {
        assert!(
            !matches!(case.verdict, Verdict::Map | Verdict::FillZero),
            "{:?}",
            case.who
        );
        if !case.served {
            assert_eq!(case.verdict, Verdict::Fail, "{:?}", case.who);
        }
    }
}

#[test]
fn only_a_present_page_is_mapped_and_only_a_zero_page_filled() {
    for case in every_case() {
        assert_eq!(case.verdict == Verdict::Map, case.state == State::Present);
        assert_eq!(case.verdict == Verdict::FillZero, case.state == State::Zero);
    }
}

/// Its bytes are in the file, and nowhere else.
#[test]
fn only_a_sourced_page_is_fetched() {
    for case in every_case() {
        let fetched = case.verdict == Verdict::Fetch;
        assert!(!fetched || case.state == State::Sourced, "{:?}", case.who);
    }
}

#[test]
fn a_removed_page_fails() {
    for case in every_case().filter(|case| case.state == State::Removed) {
        assert_eq!(case.verdict, Verdict::Fail);
    }
}

/// Exiting is right for one kind of access only, and for that one always.
#[test]
fn who_has_exits_and_nobody_else_exits() {
    for case in every_case() {
        let may_exit = match case.state {
            State::Absent => case.served,
            State::Poisoned => true,
            _ => false,
        };
        let exits = may_exit && case.who.exits;
        assert_eq!(case.verdict == Verdict::Exit, exits, "{:?}", case.who);
    }
}

#[test]
fn who_must_not_sleep_does_not() {
    for case in every_case() {
        if case.who.no_wait || !case.who.may_retry {
            assert_ne!(case.verdict, Verdict::Wait, "{:?}", case.who);
            assert_ne!(case.verdict, Verdict::Fetch, "{:?}", case.who);
        }
        if !case.who.may_retry {
            assert_ne!(case.verdict, Verdict::Retry, "{:?}", case.who);
        }
    }
}
