//! What templates make of names, and what they never make.

use std::collections::{HashMap, HashSet};

use super::*;

const SUBJECT: Subject<'_> =
    Subject { namespace: "prod", pod: "web-0.x", uid: "u", service_account: "web" };

fn location() -> Location {
    Location { node: Some("ip-10-0-0-1.internal".to_owned()), cluster: "Blue_1".parse().ok() }
}

fn template(text: &str) -> NameTemplate {
    NameTemplate::parse(text, &location()).unwrap()
}

/// Templates, and whether their names are plain.
const TEMPLATES: [(&str, bool); 18] = [
    ("kiam-kiam", true),
    ("{namespace}", true),
    ("{pod}", true),
    ("{namespace}.{pod}", true),
    ("{pod}.{namespace}", true),
    ("x-{namespace}.{pod}-y", true),
    ("{namespace}_{pod}_{service_account}", true),
    ("{cluster}@{namespace}.{pod}", true),
    ("{node}+{namespace}.{service_account}", true),
    ("{namespace}.{service_account}@{pod}", true),
    ("{namespace}X{pod}X{service_account}", true),
    ("{cluster}X{pod}", true),
    ("{namespace}-{pod}", false),
    ("{namespace}{pod}", false),
    ("{cluster}_{namespace}-{pod}", false),
    ("{service_account}.{pod}", false),
    ("{namespace}.{service_account}.{pod}", false),
    ("{pod}.{pod}", false),
];

#[test]
fn names_are_plain_where_that_says_it_all_and_else_have_a_hash() {
    for (text, plain) in TEMPLATES {
        let name = template(text).name(&SUBJECT).to_string();
        assert_eq!(!name.contains('='), plain, "{text}: {name}");
    }
    let named = |text: &str| template(text).name(&SUBJECT).to_string();
    assert_eq!(named("{cluster}@{namespace}.{pod}"), "Blue_1@prod.web-0.x");
    assert!(named("{namespace}-{pod}").starts_with("prod-web-0.x="));
    assert_eq!(named("kiam=kiam"), "kiam=kiam");
}

#[test]
fn names_that_are_cut_keep_their_beginning_and_a_hash() {
    let long = "p".repeat(253);
    let name = template("{namespace}.{pod}").name(&Subject { pod: &long, ..SUBJECT }).to_string();
    assert!(name.len() == 64 && name.starts_with("prod.ppp"), "{name}");
    let short = template("{namespace}").name(&Subject { namespace: "a", ..SUBJECT }).to_string();
    assert!(short.starts_with("a="), "one character is too short for STS: {short}");
}

/// Short values of which many concatenations are alike.
const SHORT: [&str; 12] =
    ["", "a", "c", "a-b", "b-c", "a.b", "b.c", "a-b-c", "aXb", "a_b", "a=b", "a b"];

/// These, and values that are too long, begin as chosen names do, or are not Kubernetes's at all.
fn values() -> Vec<String> {
    let others = ["-", ".", "kiam-a", "a-", "=", "é", "A", "X", "a@b", "a+b", "{pod}"];
    let mut values: Vec<String> = SHORT.iter().chain(&others).map(ToString::to_string).collect();
    for length in [51, 52, 62, 63, 64, 100] {
        values.extend(["a", "b"].map(|end| format!("{}{end}", "p".repeat(length))));
    }
    values
}

const PLACEHOLDERS: [&str; 5] =
    ["{namespace}", "{pod}", "{service_account}", "{node}", "{cluster}"];

/// The name that `text` makes of values in the order of [`PLACEHOLDERS`].
fn name(text: &str, values: &[String; 5]) -> SessionName {
    let [namespace, pod, service_account, node, cluster] = values;
    let location = Location { node: Some(node.clone()), cluster: cluster.parse().ok() };
    let subject = Subject { namespace, pod, uid: "u", service_account };
    NameTemplate::parse(text, &location).unwrap().name(&subject)
}

#[test]
fn different_values_never_have_the_same_name() {
    let values = values();
    let mut random = fastrand::Rng::with_seed(11);
    for (text, _) in TEMPLATES {
        let used = PLACEHOLDERS.map(|placeholder| text.contains(placeholder));
        let mut owners = HashMap::new();
        let mut check = |tuple: [String; 5]| {
            // What no cluster may be called does not get as far as a template.
            if used[4] && tuple[4].parse::<ClusterName>().is_err() {
                return;
            }
            let name = name(text, &tuple);
            assert_eq!(name.as_ref().parse(), Ok(name.clone()), "{text} {tuple:?}");
            let owner = owners.entry(name).or_insert_with(|| tuple.clone());
            assert_eq!(*owner, tuple, "{text}");
        };
        // All combinations of short values, for as many placeholders as any template has.
        for combination in 0..SHORT.len().pow(3) {
            let mut rest = combination;
            check(used.map(|used| {
                let value = if used { SHORT[rest % SHORT.len()] } else { "" };
                rest /= if used { SHORT.len() } else { 1 };
                value.to_owned()
            }));
        }
        for _ in 0..2_000 {
            let mut pick = || values[random.usize(..values.len())].clone();
            check(used.map(|used| if used { pick() } else { String::new() }));
        }
    }
}

#[test]
fn no_annotation_makes_a_name_that_a_template_makes_or_that_begins_or_ends_like_one() {
    let values = values();
    for (text, _) in TEMPLATES.iter().filter(|(text, _)| text.contains('{')) {
        let template = template(text);
        let mut names = HashSet::new();
        for namespace in &values {
            for pod in &values {
                let subject = Subject { namespace, pod, uid: "u", service_account: "web" };
                names.insert(template.name(&subject).to_string());
            }
        }
        let prefix = text.split('{').next().filter(|prefix| !prefix.is_empty()).unwrap_or("kiam-");
        let asked = names.iter().map(String::as_str).chain(values.iter().map(String::as_str));
        for asked in asked.flat_map(|name| [name, name.strip_prefix(prefix).unwrap_or(name)]) {
            let chosen = template.chosen(asked).to_string();
            assert!(!names.contains(&chosen), "{text}: {chosen}");
            assert!(chosen.starts_with(&format!("{prefix}=")), "{text}: {chosen}");
            assert!(chosen.ends_with('=') && chosen.len() <= 64, "{text}: {chosen}");
            assert_eq!(chosen.matches('=').count(), 2, "{text}: {chosen}");
        }
    }
}

#[test]
fn chosen_names_without_placeholders_are_kiams() {
    assert_eq!(template("prod").chosen("my app=1").to_string(), "kiam-my-app=1");
    assert_eq!(template("kiam-kiam").chosen("kiam-").to_string(), "kiam-kiam-");
    assert_eq!(template("{namespace}.{pod}").chosen("ci").to_string(), "kiam-=ci=");
    assert_eq!(template("eks-{namespace}").chosen("ci").to_string(), "eks-=ci=");
}

#[test]
fn only_placeholders_of_the_pod_tell_pods_apart() {
    for (text, varies) in [
        ("kiam", false),
        ("{node}@{cluster}", false),
        ("{node}@{pod}", true),
        ("{namespace}", true),
    ] {
        assert_eq!(template(text).varies(), varies, "{text}");
    }
}

#[test]
fn mistakes_say_what_is_right() {
    let long = format!("{{pod}}{}", "x".repeat(52));
    let cases = [
        ("a", "2 to 64"),
        ("", "2 to 64"),
        ("a!b", "2 to 64"),
        ("{pod", "a brace is unmatched"),
        ("pod}", "a brace is unmatched"),
        ("{pod}}", "a brace is unmatched"),
        ("{{pod}}", "\"{{pod}\""),
        ("{}", "\"{}\""),
        ("{Pod}", "{service_account}"),
        ("{pod}=x", "no ="),
        ("{pod} x", "beside placeholders"),
        (&long, "at most 51"),
    ];
    for (text, part) in cases {
        let error = NameTemplate::parse(text, &location()).unwrap_err().to_string();
        assert!(error.contains(part), "{text}: {error}");
    }
    let nowhere = |text| NameTemplate::parse(text, &Location::default());
    assert_eq!(nowhere("{node}.x"), Err(InvalidTemplate::NoNode));
    assert_eq!(nowhere("{cluster}.x"), Err(InvalidTemplate::NoCluster));
    for text in ["", "a b", "é", &"c".repeat(101)] {
        assert!(text.parse::<ClusterName>().is_err(), "{text:?}");
    }
}

#[test]
fn no_chosen_name_is_the_one_without_placeholders() {
    let long = format!("kiam-{}", "a".repeat(59));
    for name in ["kiam-kiam", "kiam-prod", "kiam-a-b", "kiam-=a=", "kiam-", &long] {
        let template = template(name);
        let text = name.strip_prefix("kiam-").unwrap();
        for asked in [text.to_owned(), text.replace('-', "/"), format!("{text}a")] {
            let chosen = template.chosen(&asked).to_string();
            assert!(chosen != name && chosen.starts_with("kiam-"), "{name}: {asked} is {chosen}");
        }
    }
    assert_eq!(template("kiam-prod").chosen("prod").to_string(), "kiam-=prod=");
}
