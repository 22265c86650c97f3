//! A program that the kernel refuses.

use std::{collections::BTreeSet, fs};

use lab::{LabPod, Node, PodSpec, pod_client::Options};

use super::*;
use crate::guard::GuardConfig;

/// What connect(2) to the IMDS comes to.
fn connect(pod: &LabPod) -> Option<String> {
    pod.ask_once(&Options { timeout_ms: 300, ..Options::connect() }).unwrap().error
}

/// The object with an instruction at the beginning of `program` that no kernel knows.
fn broken(program: &str) -> Vec<u8> {
    const SYMBOLS: u64 = 2;
    let number = |at: usize, size: usize| {
        let mut word = [0; 8];
        word[..size].copy_from_slice(&OBJECT[at..at + size]);
        u64::from_le_bytes(word)
    };
    let index = |at, size| usize::try_from(number(at, size)).unwrap();
    let (headers, size, count) = (index(0x28, 8), index(0x3a, 2), index(0x3c, 2));
    let header = |section: usize| headers + section * size;
    // Where a section's content is in the file, and how long it is.
    let content = |section| (index(header(section) + 0x18, 8), index(header(section) + 0x20, 8));
    let symbols = (0..count).find(|&section| number(header(section) + 4, 4) == SYMBOLS).unwrap();
    let names = content(index(header(symbols) + 0x28, 4)).0;
    let (first, length) = content(symbols);
    let named = |symbol: &usize| {
        let name = &OBJECT[names + index(*symbol, 4)..];
        name.starts_with(program.as_bytes()) && name[program.len()] == 0
    };
    let symbol = (first..first + length).step_by(24).find(named).unwrap();
    let mut object = OBJECT.to_vec();
    object[content(index(symbol + 6, 2)).0 + index(symbol + 8, 8)] = 0xff;
    object
}

#[test]
fn a_program_that_the_kernel_refuses_leaves_nothing_attached_or_pinned() {
    if lab::skip!() {
        return;
    }
    let node = Node::start().unwrap();
    let pod = node.pod(PodSpec::new("default", "a").with_uid().unwrap()).unwrap();
    let before = connect(&pod);
    let pins = node.bpffs().join("kiam");
    let config = Config {
        attested: true,
        guard: GuardConfig { uplink: true, ..GuardConfig::default() },
        ..Config::new(Some(node.kubepods().to_owned()), pins.clone())
    };
    let start = |object: &[u8]| {
        let blocking = Blocking::here().unwrap();
        Interception::load_object(object, &blocking, &config, Target::default())
            .and_then(|loaded| loaded.attach(&blocking, &[]))
    };
    let start = |object: &[u8]| node.netns().enter(|| start(object)).unwrap();
    for program in
        [program::SENDMSG6, program::GUARD, program::LISTENER, program::REWRITE, program::UPLINK]
    {
        let error = start(&broken(program)).map(drop).unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, Error::Refused(_)) && text.contains(program), "{text}");
        let pinned: Vec<_> = fs::read_dir(pins::current(&pins)).unwrap().flatten().collect();
        assert!(pinned.is_empty(), "{program}: {pinned:?}");
        assert_eq!(connect(&pod), before, "{program}");
    }
    // An agent that is refused later leaves what works: without a lease it denies.
    let parts = start(OBJECT).unwrap();
    drop(parts);
    assert_eq!(connect(&pod).as_deref(), Some("EPERM"));
    start(&broken(program::UPLINK)).map(drop).unwrap_err();
    assert_eq!(connect(&pod).as_deref(), Some("EPERM"));
}

#[test]
fn every_program_and_map_is_in_the_tables_of_features() {
    let programs = ENFORCING.into_iter().chain(OBSERVING);
    for name in
        programs.chain([program::GUARD, program::LISTENER, program::REWRITE, program::UPLINK])
    {
        assert!(features::of_program(name).is_some(), "{name}");
    }
    let of_map = features::of_map;
    let maps: Vec<_> = map::PINNED.into_iter().filter(|name| of_map(name) != of_map("")).collect();
    assert_eq!(maps.len(), 5, "those of another kind than hashes and arrays: {maps:?}");
    assert_eq!(features::of_program("somebody's"), None);
}

#[test]
fn the_object_has_exactly_the_names_that_both_sides_know() {
    let parsed = aya_obj::Object::parse(OBJECT).unwrap();
    let programs: BTreeSet<&str> = parsed.programs.keys().map(String::as_str).collect();
    assert_eq!(programs, BTreeSet::from(program::ALL));
    // Constants are in sections that look like maps; the log of programs has its own.
    let maps = parsed.maps.keys().map(String::as_str);
    let maps: BTreeSet<&str> =
        maps.filter(|name| !name.starts_with('.') && !name.starts_with("AYA_")).collect();
    let known = map::PINNED.into_iter().chain([map::PROBE_NETNS]);
    assert_eq!(maps, known.collect());
}
