use std::{
    ffi::CString,
    fs,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use lab::{Cgroup, Layout};
use tokio::time::timeout;

use super::{spent::REST, *};

const A: &str = "0f8fad5b-d9cb-469f-a165-70867728950e";
/// How long a change may take to come on a busy machine.
const LIMIT: Duration = Duration::from_secs(60);
const B: &str = "7c9e6679-7425-40de-944b-e07fc1f90ae7";

/// The pods' cgroup of a node, and the watch of it.
struct Stage {
    root: Cgroup,
    watch: Watch,
}

impl Stage {
    fn start(name: &str) -> Option<Self> {
        if lab::skip!() {
            return None;
        }
        let mount = lab::cgroup_mount_point().unwrap();
        let path = mount.join(format!("kiam-test-{name}-{}", std::process::id()));
        let root = Cgroup::create(path).unwrap();
        let watch = Watch::new(root.path().to_owned());
        Some(Self { root, watch })
    }

    /// Waits until `change` has come, and returns all that came up to it.
    async fn until(&mut self, change: &Change) -> Vec<Change> {
        let mut all = Vec::new();
        while !all.contains(change) {
            let next = timeout(LIMIT, self.watch.changes()).await;
            all.extend(next.unwrap_or_else(|_| panic!("no {change:?} after {all:?}")));
        }
        all
    }

    /// How many containers of pod A are watched.
    fn containers(&self) -> usize {
        let containers = self.watch.pods[&uid(A)].containers.values();
        containers.filter(|watches| watches.len() == 2).count()
    }
}

/// `truncate(2)`: a file system's users see a change, whatever is in the file.
fn truncate(path: &Path) {
    let path = CString::new(path.as_os_str().as_bytes()).unwrap();
    // SAFETY: the path ends with 0.
    assert_eq!(unsafe { libc::truncate(path.as_ptr(), 0) }, 0);
}

fn uid(text: &str) -> PodUid {
    PodUid::new(text)
}

#[tokio::test]
async fn pods_of_every_layout_are_noticed_when_they_come_stir_and_go() {
    let Some(mut stage) = Stage::start("pods_are_noticed") else { return };
    assert_eq!(stage.watch.sweep(), []);
    for layout in [Layout::SystemdBurstable, Layout::SystemdGuaranteed, Layout::CgroupfsBurstable] {
        let container = Cgroup::create(stage.root.path().join(layout.container(A, "1"))).unwrap();
        let pod = container.path().parent().unwrap().to_owned();
        let made = Change::Created(uid(A), pod.clone());
        stage.until(&made).await;
        let mut process = std::process::Command::new("sleep");
        container.adopt(process.arg("60")).unwrap();
        let mut process = process.spawn().unwrap();
        stage.until(&Change::FirstProcess(uid(A))).await;
        container.kill().unwrap();
        process.wait().unwrap();
        stage.until(&Change::Members(uid(A))).await;
        fs::create_dir(pod.join("2")).unwrap();
        while stage.containers() < 2 {
            stage.until(&Change::Members(uid(A))).await;
        }
        fs::remove_dir(pod.join("2")).unwrap();
        while stage.containers() > 1 {
            stage.until(&Change::Members(uid(A))).await;
        }
        drop(container);
        fs::remove_dir(&pod).unwrap();
        stage.until(&Change::Removed(uid(A))).await;
    }
    // What remains is the folder above, the pods' cgroup and the QoS classes'.
    assert_eq!((stage.watch.watches.len(), stage.watch.pods.len()), (4, 0));
}

#[tokio::test]
async fn what_a_container_makes_is_neither_believed_nor_watched() {
    let Some(mut stage) = Stage::start("container_makes") else { return };
    let container = stage.root.path().join(format!("burstable/pod{A}/1"));
    fs::create_dir_all(&container).unwrap();
    let made = Change::Created(uid(A), container.parent().unwrap().to_owned());
    assert!(stage.watch.sweep().contains(&made));
    let watched = stage.watch.watches.len();
    fs::create_dir_all(container.join(format!("pod{B}/1"))).unwrap();
    fs::create_dir_all(stage.root.path().join(format!("mine/pod{B}"))).unwrap();
    fs::create_dir_all(stage.root.path().join(format!("burstable/burstable/pod{B}"))).unwrap();
    let other = stage.root.path().join(format!("pod{B}"));
    fs::create_dir(&other).unwrap();
    let all = stage.until(&Change::Created(uid(B), other)).await;
    assert_eq!(all.len(), 1, "{all:?}");
    assert_eq!(stage.watch.watches.len(), watched + 2);
    for _ in 0..2 {
        stage.watch.sweep();
        assert_eq!(stage.watch.watches.len(), watched + 2);
    }
}

#[tokio::test]
async fn a_container_that_joins_its_own_cgroup_again_and_again_is_noticed_once() {
    let Some(mut stage) = Stage::start("joins_again") else { return };
    stage.watch.sweep();
    let path = stage.root.path().join(Layout::SystemdBurstable.container(A, "1"));
    let container = Cgroup::create(&path).unwrap();
    stage.until(&Change::Created(uid(A), path.parent().unwrap().to_owned())).await;
    let mut process = std::process::Command::new("sh");
    let joins = "for n in $(seq 5000); do echo 0 > \"$0\"; done";
    container.adopt(process.args(["-c", joins]).arg(path.join("cgroup.procs"))).unwrap();
    let mut process = process.spawn().unwrap();
    let (mut joined, mut woken) = (0, 0);
    while process.try_wait().unwrap().is_none() {
        let changes = timeout(Duration::from_millis(20), stage.watch.changes()).await;
        let Ok(changes) = changes else { continue };
        woken += 1;
        joined += changes.iter().filter(|change| **change == Change::FirstProcess(uid(A))).count();
    }
    assert!(joined == 1 && woken < 10, "{joined}, and woken {woken} times");
}

#[tokio::test]
async fn a_container_that_changes_its_own_events_again_and_again_is_noticed_a_few_times_a_second() {
    let Some(mut stage) = Stage::start("events_again") else { return };
    stage.watch.sweep();
    let path = stage.root.path().join(Layout::SystemdBurstable.container(A, "1"));
    let container = Cgroup::create(&path).unwrap();
    stage.until(&Change::Created(uid(A), path.parent().unwrap().to_owned())).await;
    let (events, ended) = (path.join("cgroup.events"), Arc::new(AtomicBool::new(false)));
    let flood = std::thread::spawn({
        let ended = ended.clone();
        move || {
            while !ended.load(Ordering::Relaxed) {
                truncate(&events);
            }
        }
    });
    let (begun, mut woken) = (Instant::now(), 0);
    while begun.elapsed() < REST * 10 {
        let changes = timeout(Duration::from_millis(20), stage.watch.changes()).await;
        woken += usize::from(changes.is_ok_and(|changes| !changes.is_empty()));
    }
    ended.store(true, Ordering::Relaxed);
    flood.join().unwrap();
    // An event, and then that it is watched again, each time.
    assert!((10..30).contains(&woken), "woken {woken} times");
    // The last process goes while nothing is watched, and that shows.
    truncate(&path.join("cgroup.events"));
    stage.until(&Change::Members(uid(A))).await;
    let mut process = std::process::Command::new("true");
    container.adopt(&mut process).unwrap();
    process.status().unwrap();
    stage.until(&Change::Members(uid(A))).await;
}

#[tokio::test]
async fn a_pod_whose_containers_change_their_events_in_turn_is_noticed_no_more_often() {
    let Some(mut stage) = Stage::start("events_in_turn") else { return };
    stage.watch.sweep();
    let pod = stage.root.path().join(format!("burstable/pod{A}"));
    let paths: Vec<_> = (0..40).map(|number| pod.join(number.to_string())).collect();
    paths.iter().for_each(|path| fs::create_dir_all(path).unwrap());
    while !stage.watch.pods.contains_key(&uid(A)) || stage.containers() < paths.len() {
        stage.watch.changes().await;
    }
    let ended = Arc::new(AtomicBool::new(false));
    let flood = std::thread::spawn({
        let (files, ended) = (paths.clone(), ended.clone());
        move || {
            while !ended.load(Ordering::Relaxed) {
                for path in &files {
                    truncate(&path.join("cgroup.events"));
                    std::thread::sleep(Duration::from_millis(2));
                }
            }
        }
    });
    // Each of them has one event at first.
    let (began, mut woken) = (Instant::now(), 0);
    while began.elapsed() < Duration::from_secs(4) {
        woken +=
            usize::from(timeout(Duration::from_millis(20), stage.watch.changes()).await.is_ok());
    }
    ended.store(true, Ordering::Relaxed);
    flood.join().unwrap();
    // Then one is watched again every 200 ms, and has its event.
    // Other tests create cgroups beside this one meanwhile.
    assert!(woken < 40 + 4 * 2 * 5 + 20, "woken {woken} times");
    // All of them are watched again in the end.
    while !stage.watch.spent.is_empty() {
        timeout(LIMIT, stage.watch.changes()).await.unwrap();
    }
    truncate(&paths[7].join("cgroup.events"));
    stage.until(&Change::Members(uid(A))).await;
}

#[tokio::test]
async fn an_event_that_was_not_read_before_a_catch_up_is_not_lost() {
    let Some(mut stage) = Stage::start("unread_event") else { return };
    let pod = stage.root.path().join(format!("burstable/pod{A}"));
    for name in ["1", "2"] {
        fs::create_dir_all(pod.join(name)).unwrap();
    }
    stage.watch.sweep();
    // As where the system has refused to watch the other one.
    let containers = &mut stage.watch.pods.get_mut(&uid(A)).unwrap().containers;
    let missing = std::mem::take(containers.get_mut(OsStr::new("2")).unwrap());
    missing.into_iter().for_each(|watch| stage.watch.watches.end(watch));
    truncate(&pod.join("1/cgroup.events"));
    let changes = stage.watch.catch_up();
    assert_eq!(changes, [Change::Members(uid(A))]);
    assert_eq!(stage.watch.catch_up(), [], "all is watched");
}

/// Makes and removes containers of eight pods, and pods, and changes their events, all in no order.
fn rage(root: &Path, seed: u64, ended: &AtomicBool) {
    let mut random = fastrand::Rng::with_seed(seed);
    while !ended.load(Ordering::Relaxed) {
        let pod = root.join(format!("burstable/pod{}", storm_uid(random.u8(..8))));
        let container = pod.join(random.u8(..3).to_string());
        // Another thread may have been faster with any of it.
        match random.u8(..8) {
            0..=2 => drop(fs::create_dir_all(&container)),
            3 => drop(fs::remove_dir(&container)),
            4 => drop(fs::remove_dir(&pod)),
            _ => {
                drop(fs::OpenOptions::new().write(true).truncate(true).open(match random.bool() {
                    true => container.join("cgroup.events"),
                    false => pod.join("cgroup.events"),
                }))
            }
        }
        if random.u8(..16) == 0 {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

fn storm_uid(number: u8) -> PodUid {
    PodUid::new(&format!("{number:08x}-d9cb-469f-a165-70867728950e"))
}

#[tokio::test]
async fn nothing_is_lost_where_cgroups_come_and_go_while_watches_are_renewed() {
    let Some(mut stage) = Stage::start("renewed_in_a_storm") else { return };
    stage.watch.sweep();
    let ended = Arc::new(AtomicBool::new(false));
    let root = stage.root.path().to_owned();
    let threads: Vec<_> = (0..3)
        .map(|seed| {
            let (root, ended) = (root.clone(), ended.clone());
            std::thread::spawn(move || rage(&root, seed, &ended))
        })
        .collect();
    let (begun, mut known) = (Instant::now(), std::collections::HashSet::new());
    // As `Sandboxes` keeps them.
    let mut take = |changes: Vec<Change>| {
        for change in changes {
            match change {
                Change::Created(pod, _) => drop(known.insert(pod)),
                Change::Removed(pod) => drop(known.remove(&pod)),
                Change::Members(_) | Change::FirstProcess(_) | Change::Swept(_) => {}
                Change::Moved => panic!("the pods' cgroup stays"),
                Change::Lost => panic!("more events than the kernel keeps"),
            }
        }
        known.len()
    };
    let mut renewed = 0;
    while begun.elapsed() < REST * 20 {
        let before = stage.watch.spent.len();
        if let Ok(changes) = timeout(Duration::from_millis(5), stage.watch.changes()).await {
            take(changes);
        }
        renewed += usize::from(stage.watch.spent.len() < before);
        if renewed % 8 == 7 {
            take(stage.watch.catch_up());
        }
    }
    ended.store(true, Ordering::Relaxed);
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    assert!(renewed > 10, "watches were renewed {renewed} times");
    // Events alone, and no sweep, tell how it ended.
    while let Ok(changes) = timeout(REST * 4, stage.watch.changes()).await {
        take(changes);
    }
    let mut there = 0;
    for number in 0..8 {
        let (uid, path) = (storm_uid(number), format!("burstable/pod{}", storm_uid(number)));
        let path = stage.root.path().join(path);
        assert_eq!(stage.watch.pods.contains_key(&uid), path.exists(), "{number}");
        let Some(pod) = stage.watch.pods.get(&uid) else { continue };
        there += 1;
        assert!(pod.is_there() && pod.is_watched(), "{pod:?}");
        let names: Vec<_> = pod.containers.keys().map(|name| path.join(&**name)).collect();
        let exist = (0..3).map(|name| path.join(name.to_string())).filter(|it| it.exists());
        assert_eq!(names.len(), exist.count(), "{names:?}");
        for cgroup in names.iter().chain([&path]) {
            truncate(&cgroup.join("cgroup.events"));
            stage.until(&Change::Members(uid.clone())).await;
        }
    }
    assert_eq!(take(Vec::new()), there);
}

#[tokio::test]
async fn the_watches_of_one_pod_are_bounded() {
    let Some(mut stage) = Stage::start("watches_bounded") else { return };
    stage.watch.sweep();
    let pod = stage.root.path().join(format!("pod{A}"));
    fs::create_dir(&pod).unwrap();
    stage.until(&Change::Created(uid(A), pod.clone())).await;
    for n in 0..2 * CONTAINERS {
        fs::create_dir(pod.join(n.to_string())).unwrap();
    }
    stage.until(&Change::Members(uid(A))).await;
    stage.watch.sweep();
    assert_eq!(stage.watch.watches.len(), 1 + 1 + 2 + 2 * CONTAINERS);
}

#[tokio::test]
async fn a_sweep_finds_what_no_event_told() {
    let Some(mut stage) = Stage::start("sweep_finds") else { return };
    let pod = |uid: &str| stage.root.path().join(format!("burstable/pod{uid}"));
    let (a, b) = (pod(A), pod(B));
    fs::create_dir_all(a.join("1")).unwrap();
    stage.watch.sweep();
    // Without the queue, as after an overflow.
    fs::remove_dir(a.join("1")).unwrap();
    fs::remove_dir(&a).unwrap();
    fs::create_dir_all(b.join("1")).unwrap();
    fs::create_dir_all(a.join("1")).unwrap();
    let changes = stage.watch.sweep();
    let gone = changes.iter().position(|it| *it == Change::Removed(uid(A))).unwrap();
    let made = changes.iter().position(|it| *it == Change::Created(uid(A), a.clone())).unwrap();
    assert!(gone < made && changes.contains(&Change::Created(uid(B), b)), "{changes:?}");
    // The late events change nothing.
    while let Ok(changes) = timeout(Duration::from_millis(50), stage.watch.changes()).await {
        let stirred =
            |change: &Change| matches!(change, Change::Members(_) | Change::FirstProcess(_));
        assert!(changes.iter().all(stirred));
    }
    assert_eq!(stage.watch.pods.len(), 2);
    // The pods' cgroup itself.
    let root = stage.root.path().to_owned();
    drop(stage.root);
    assert!(stage.watch.is_moved());
    let again = Cgroup::create(root).unwrap();
    fs::create_dir_all(&a).unwrap();
    let changes = stage.watch.sweep();
    assert!(changes.contains(&Change::Created(uid(A), a)), "{changes:?}");
    assert!(!stage.watch.is_moved());
    drop(again);
}

#[tokio::test]
async fn the_pods_cgroup_that_goes_and_comes_again_shows_by_events_alone() {
    let Some(mut stage) = Stage::start("root_moves") else { return };
    stage.watch.sweep();
    assert!(stage.watch.is_root_watched());
    let root = stage.root.path().to_owned();
    stage.root = Cgroup::create(root.with_extension("other")).unwrap();
    stage.until(&Change::Moved).await;
    assert!(stage.watch.is_moved());
    stage.watch.sweep();
    let again = Cgroup::create(root.clone()).unwrap();
    stage.until(&Change::Moved).await;
    stage.watch.sweep();
    assert!(!stage.watch.is_moved());
    let pod = root.join(format!("pod{A}"));
    fs::create_dir(&pod).unwrap();
    stage.until(&Change::Created(uid(A), pod)).await;
    drop(again);
}

#[tokio::test]
async fn the_pods_cgroup_shows_when_all_above_it_is_made_again() {
    let Some(stage) = Stage::start("root_nested") else { return };
    let slice = stage.root.path().join("kubelet.slice");
    let root = slice.join("kubelet-kubepods.slice");
    fs::create_dir_all(&root).unwrap();
    let mut stage = Stage { watch: Watch::new(root.clone()), ..stage };
    stage.watch.sweep();
    for _ in 0..2 {
        fs::remove_dir(&root).unwrap();
        fs::remove_dir(&slice).unwrap();
        stage.until(&Change::Moved).await;
        stage.watch.sweep();
        fs::create_dir(&slice).unwrap();
        stage.until(&Change::Moved).await;
        stage.watch.sweep();
        fs::create_dir(&root).unwrap();
        stage.until(&Change::Moved).await;
        stage.watch.sweep();
        assert!(!stage.watch.is_moved() && stage.watch.is_root_watched());
    }
    fs::remove_dir(&root).unwrap();
    fs::remove_dir(&slice).unwrap();
}

#[tokio::test]
async fn a_sweep_that_finds_nothing_new_says_so() {
    let Some(mut stage) = Stage::start("sweep_quiet") else { return };
    fs::create_dir_all(stage.root.path().join(format!("burstable/pod{A}/1"))).unwrap();
    assert_eq!(stage.watch.sweep().len(), 1);
    assert_eq!(stage.watch.sweep(), [Change::Swept(uid(A))]);
    // An event that nobody read yet is no less for the sweep.
    fs::create_dir(stage.root.path().join(format!("burstable/pod{A}/2"))).unwrap();
    assert_eq!(stage.watch.sweep(), [Change::Members(uid(A))]);
}

#[tokio::test]
async fn more_events_than_the_kernel_keeps_are_told() {
    let Some(mut stage) = Stage::start("events_lost") else { return };
    stage.watch.sweep();
    let most: usize = fs::read_to_string("/proc/sys/fs/inotify/max_queued_events")
        .unwrap()
        .trim()
        .parse()
        .unwrap();
    let path = stage.root.path().join("x");
    for _ in 0..=most / 2 {
        fs::create_dir(&path).unwrap();
        fs::remove_dir(&path).unwrap();
    }
    stage.until(&Change::Lost).await;
}
