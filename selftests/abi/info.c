// SPDX-License-Identifier: GPL-2.0
/* KDP_INFO, and what /proc/PID/fdinfo tells. */
#include "test.h"

#define PAGES	64

FIXTURE(abi) {
	int vm;
};

FIXTURE_SETUP(abi)
{
	self->vm = vm_open(_metadata);
}

FIXTURE_TEARDOWN(abi)
{
	close(self->vm);
}

TEST_F(abi, info_values)
{
	const __u64 known = KDP_FEATURE_EXITS | KDP_FEATURE_PATHS | KDP_FEATURE_HUGE |
			    KDP_FEATURE_ZERO | KDP_FEATURE_COLLAPSE | KDP_FEATURE_SOURCE |
			    KDP_FEATURE_POISON | KDP_FEATURE_MEMORY_FAILURE |
			    KDP_FEATURE_REPLACE | KDP_FEATURE_PLACE | KDP_FEATURE_CLAIM |
			    KDP_FEATURE_MEMFD;
	const __u64 always = KDP_FEATURE_PATHS | KDP_FEATURE_ZERO | KDP_FEATURE_COLLAPSE |
			     KDP_FEATURE_SOURCE | KDP_FEATURE_POISON | KDP_FEATURE_REPLACE |
			     KDP_FEATURE_PLACE | KDP_FEATURE_CLAIM;
	struct kdp_info info = {
		.size = sizeof(info), .api_version = ~0U, .page_shift = ~0U, .features = ~0ULL,
		.bitmap_offset = ~0ULL, .max_pages = ~0ULL, .max_memslots = ~0U,
		.max_vcpu_threads = ~0U, .max_ranges = ~0U, .event_size = ~0U,
	};

	ASSERT_EQ(0, kdp_ioctl(self->vm, KDP_INFO, &info));
	EXPECT_EQ(sizeof(info), info.size);
	EXPECT_EQ(0, info.flags);
	EXPECT_EQ(KDP_API_VERSION, info.api_version);
	EXPECT_EQ(KDP_PAGE_SHIFT, info.page_shift);
	EXPECT_EQ(0, info.features & ~known);
	EXPECT_EQ(always, info.features & always);
	EXPECT_EQ(KDP_BITMAP_OFFSET, info.bitmap_offset);
	EXPECT_EQ(KDP_MAX_PAGES, info.max_pages);
	EXPECT_EQ(KDP_MAX_MEMSLOTS, info.max_memslots);
	EXPECT_EQ(KDP_MAX_VCPU_THREADS, info.max_vcpu_threads);
	EXPECT_EQ(KDP_MAX_RANGES, info.max_ranges);
	EXPECT_EQ(sizeof(struct kdp_event), info.event_size);
}

TEST_F(abi, info_longer_struct_keeps_its_size)
{
	union {
		struct kdp_info info;
		unsigned char bytes[256];
	} arg = { .info.size = sizeof(arg) };

	ASSERT_EQ(0, kdp_ioctl(self->vm, KDP_INFO, &arg));
	EXPECT_EQ(KDP_API_VERSION, arg.info.api_version);
	/* What the module does not know is left alone. */
	for (size_t i = sizeof(struct kdp_info); i < sizeof(arg); i++) {
		EXPECT_EQ(0, arg.bytes[i]) TH_LOG("byte %zu was written", i);
	}
}

/* EXPECT a line "KEY:\tVALUE" in the fdinfo of a descriptor. */
#define EXPECT_FDINFO(fd, key, value) do {						\
	char path_[64], line_[256], want_[128];						\
	bool found_ = false;								\
	FILE *f_;									\
	snprintf(path_, sizeof(path_), "/proc/self/fdinfo/%d", fd);			\
	snprintf(want_, sizeof(want_), "%s:\t%s\n", key, value);			\
	f_ = fopen(path_, "re");							\
	ASSERT_NE(NULL, f_);								\
	while (fgets(line_, sizeof(line_), f_))						\
		found_ |= !strcmp(line_, want_);					\
	fclose(f_);									\
	EXPECT_TRUE(found_) TH_LOG("%s has no line '%s: %s'", path_, key, value);	\
} while (0)

TEST_F(abi, fdinfo_of_vm_and_memslot)
{
	struct slot s = slot_new(_metadata, self->vm, 50, PAGES, KDP_MEMSLOT_PAGING);
	struct toucher t = { 0 };

	EXPECT_FDINFO(self->vm, "kdp-memslots", "1");
	EXPECT_FDINFO(self->vm, "kdp-events-pending", "0");
	EXPECT_FDINFO(self->vm, "kdp-waits", "0");
	EXPECT_FDINFO(s.fd, "kdp-slot", "50");
	EXPECT_FDINFO(s.fd, "kdp-pages", "64");
	EXPECT_FDINFO(s.fd, "kdp-paging", "on");
	EXPECT_FDINFO(s.fd, "kdp-pinned-pages", "0");
	ASSERT_TRUE(toucher_start(&t, s.guest, TOUCH_READ));
	ASSERT_TRUE(event_pending(self->vm, PATIENCE_MS));
	EXPECT_FDINFO(self->vm, "kdp-events-pending", "1");
	EXPECT_FDINFO(self->vm, "kdp-events-unread", "1");
	event_read(_metadata, self->vm);
	EXPECT_FDINFO(self->vm, "kdp-events-pending", "1");
	EXPECT_FDINFO(self->vm, "kdp-events-unread", "0");
	EXPECT_FDINFO(self->vm, "kdp-waits", "1");
	EXPECT_MARK(3, &s, KDP_STATE_PRESENT, 0, 3);
	ASSERT_TRUE(toucher_join(&t));
	EXPECT_FDINFO(self->vm, "kdp-events-pending", "0");
	EXPECT_FDINFO(self->vm, "kdp-events-read", "1");
	EXPECT_FDINFO(self->vm, "kdp-faults", "1");
	EXPECT_FDINFO(self->vm, "kdp-resolved", "3");
	EXPECT_FDINFO(s.fd, "kdp-pinned-pages", "0");
	EXPECT_MARK(1, &s, KDP_STATE_ZERO, 9, 1);
	EXPECT_BYTE(0, s.guest + 9 * PAGE);
	EXPECT_FDINFO(s.fd, "kdp-zero-filled", "1");
	EXPECT_FDINFO(s.fd, "kdp-pinned-pages", "0");
	EXPECT_MARK(4, &s, KDP_STATE_ABSENT, 0, PAGES);
	EXPECT_EQ(0, kdp_paging(self->vm, 50, KDP_PAGING_OFF));
	EXPECT_FDINFO(s.fd, "kdp-paging", "off");
	/* What a removed memslot has counted stays in the VM's sum. */
	EXPECT_EQ(0, kdp_remove(self->vm, 50));
	EXPECT_FDINFO(self->vm, "kdp-memslots", "0");
	EXPECT_FDINFO(self->vm, "kdp-waits", "1");
}

/* Huge pages are pinned as they are touched. Pages of shmem never are. */
TEST_F(abi, fdinfo_counts_pinned_huge_pages)
{
	struct slot s;

	if (!hugetlb_reserve(2))
		SKIP(return, "no two free 2 MiB pages");
	s = slot_on(_metadata, self->vm, 51, 1024, KDP_MEMSLOT_PAGING, true);
	EXPECT_MARK(1023, &s, KDP_STATE_PRESENT, 0, 1023);
	EXPECT_FDINFO(s.fd, "kdp-pinned-pages", "0");
	EXPECT_BYTE(0, s.guest + 7 * PAGE);
	EXPECT_FDINFO(s.fd, "kdp-pinned-pages", "512");
	EXPECT_MARK(1, &s, KDP_STATE_ZERO, 1023, 1);
	EXPECT_BYTE(0, s.guest + 1023 * PAGE);
	EXPECT_FDINFO(s.fd, "kdp-zero-filled", "1");
	EXPECT_FDINFO(s.fd, "kdp-pinned-pages", "1024");
	/* A huge page of which one page is present stays. */
	EXPECT_MARK(1023, &s, KDP_STATE_ABSENT, 0, 1023);
	EXPECT_FDINFO(s.fd, "kdp-pinned-pages", "512");
	EXPECT_MARK(1, &s, KDP_STATE_ABSENT, 1023, 1);
	EXPECT_FDINFO(s.fd, "kdp-pinned-pages", "0");
}
