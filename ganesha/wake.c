/*
 * Preloaded into ganesha.nfsd. ganesha looks whether all clients are back after a restart only every half lease, or
 * 10 s; reaper_wake() has it look at once. Each byte that is read from the FIFO SHARE_MANAGER_WAKE does that.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <unistd.h>

static void (*reaper_wake)(void);
static const char *fifo;

static void *serve(void *unused)
{
	char wanted;
	int fd;

	(void)unused;
	/* waits for somebody who writes, and again when they are gone */
	while ((fd = open(fifo, O_RDONLY | O_CLOEXEC)) >= 0) {
		while (read(fd, &wanted, 1) == 1)
			reaper_wake();
		close(fd);
	}
	return NULL;
}

__attribute__((constructor)) static void start(void)
{
	sigset_t all, before;
	pthread_t thread;

	/* the program that enters ganesha's namespace comes by here, too, and must stay without threads */
	*(void **)&reaper_wake = dlsym(RTLD_DEFAULT, "reaper_wake");
	fifo = getenv("SHARE_MANAGER_WAKE");
	if (reaper_wake == NULL || fifo == NULL)
		return;
	/* signals are for ganesha's own threads */
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	if (pthread_create(&thread, NULL, serve, NULL) == 0)
		pthread_detach(thread);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
}
